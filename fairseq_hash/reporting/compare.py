"""Which runs may be compared: complete, of one kind of data, evaluated alike."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq_hash.reporting.checkpoints import contradiction
from fairseq_hash.reporting.options import STOPS, stable
from fairseq_hash.reporting.runs import Run


def sort_out(runs: Sequence[Run]) -> tuple[list[Run], dict[Path, str]]:
    """Return the runs that may be compared, and why each other one may not, by its folder."""
    reasons = {run.folder: reason for run in runs if (reason := why_incomplete(run))}
    complete = [run for run in runs if run.folder not in reasons]
    subsets = {subset: None for run in complete for subset in run.evaluations}
    for run in complete:
        if missing := [subset for subset in subsets if subset not in run.evaluations]:
            reasons[run.folder] = f"not evaluated on {' and '.join(missing)}"
    complete = [run for run in complete if run.folder not in reasons]
    reasons |= _odd_ones(complete)
    complete = [run for run in complete if run.folder not in reasons]
    first: dict[tuple[str, int], Run] = {}
    for run in complete:
        same = first.setdefault((run.model, run.seed), run)
        if same is not run:
            reasons[run.folder] = f"same options and seed as {same.folder}"
    return [run for run in complete if run.folder not in reasons], reasons


def why_incomplete(run: Run) -> "str | None":
    """Return why a run cannot be compared with any other, None where it can."""
    training = run.training
    if training.model is None:
        return "its log has no model_record: trained without --arch hash_transformer_lm"
    if training.finished is None:
        by = f" by {training.stopped_by}" if training.stopped_by else ""
        stop = training.config[STOPS[0]]
        return f"training stopped{by} at update {training.updates:,}" + (f" of {stop:,}" if stop else "")
    if changed := _changed_on_resuming(training.configs):
        return f"resumed with other options: {', '.join(sorted(changed))}"
    if not training.intervals:
        return "its log has no train_inner lines; train with --log-format json and a smaller --log-interval"
    for subset, evaluation in run.evaluations.items():
        if evaluation.perplexity is None:
            return f"the evaluation on {subset} has no result"
        if not math.isfinite(evaluation.perplexity):
            return f"its perplexity on {subset} is {evaluation.perplexity}"
        if evaluation.time < training.finished:
            return f"evaluated on {subset} before training was done"
        if (evaluation.model or training.model)["dictionary_fingerprint"] != training.model["dictionary_fingerprint"]:
            return f"evaluated on {subset} with another dictionary than it was trained with"
    return contradiction(run)


def _changed_on_resuming(configs: Sequence[dict[str, Any]]) -> set[str]:
    """Return the options that differ between sessions; the seed, too, belongs to one training."""
    sessions = [{**stable(config), "common.seed": config.get("common.seed")} for config in configs]
    return {key for session in sessions for key in _differences(session, sessions[-1])}


def _differences(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    return {key for key in {*one, *other} if one.get(key) != other.get(key)}


def _odd_ones(runs: Sequence[Run]) -> dict[Path, str]:
    """Return the runs that were trained or evaluated on other data, or evaluated otherwise, than most."""
    circumstances = {run.folder: _circumstances(run) for run in runs}
    reasons: dict[Path, str] = {}
    for name in dict.fromkeys(name for values in circumstances.values() for name in values):
        counts = Counter(values.get(name) for values in circumstances.values())
        usual = max(counts, key=counts.__getitem__)
        for folder, values in circumstances.items():
            if values.get(name) != usual:
                reasons.setdefault(folder, f"{name} is {values.get(name)}, in the other runs {usual}")
    return reasons


def _circumstances(run: Run) -> dict[str, Any]:
    values = (
        {"the data fingerprint": str(run.record["data_fingerprint"])[:12]} if "data_fingerprint" in run.record else {}
    )
    for subset, evaluation in run.evaluations.items():
        values[f"the number of {subset} tokens"] = f"{evaluation.tokens:,}"
        values[f"the checkpoint evaluated on {subset}"] = evaluation.checkpoint
        for key in ("task.tokens_per_sample", "task.sample_break_mode", "eval_lm.context_window"):
            values[f"{key} of the evaluation on {subset}"] = evaluation.config.get(key)
    return values
