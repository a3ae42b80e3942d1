"""Selects the runs that may be compared: complete, on the same data, evaluated alike."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairseq_hash.core.errors import UserError
from fairseq_hash.reporting.run_options import stable
from fairseq_hash.reporting.runs import Run

if TYPE_CHECKING:
    from fairseq_hash.checkpoint.manifest import Manifest

# Entries of both a checkpoint's manifest and the model's record, by their name in words.
SAID_BY_BOTH = {
    "num_experts": "number of experts",
    "router": "router",
    "dictionary_fingerprint": "dictionary fingerprint",
    "table_fingerprint": "hash table fingerprint",
}
USUAL = ("checkpoint_best.pt", "checkpoint_last.pt")


def sort_out(runs: Sequence[Run], unfinished: bool = False) -> tuple[list[Run], dict[Path, str]]:
    """Return the runs that may be compared, and for each other run, by folder, the reason why not.

    The runs have one dictionary. `unfinished`: whether runs may be compared whose training is not done.
    """
    reasons = {run.folder: reason for run in runs if (reason := why_incomplete(run, unfinished))}
    for left_out in (_odd_ones, _not_evaluated_as_their_like, _repeated):
        reasons |= left_out([run for run in runs if run.folder not in reasons])
    return [run for run in runs if run.folder not in reasons], reasons


def why_incomplete(run: Run, unfinished: bool = False) -> "str | None":
    """Return why a run cannot be compared with any other run, None if it can."""
    training = run.training
    if run.not_done and (training.model is None or not unfinished):
        return run.not_done
    if training.model is None:
        return "its log has no model_record: trained without --arch hash_transformer_lm"
    if changed := _changed_on_resuming(training.configs):
        return f"resumed with other options: {', '.join(sorted(changed))}"
    if not training.intervals:
        return "its log has no statistics of the training; train with --log-format json"
    for subset, evaluation in run.evaluations.items():
        if not math.isfinite(evaluation.perplexity):
            return f"its perplexity on {subset} is {evaluation.perplexity}"
    return _contradiction(run)


def _not_evaluated_as_their_like(runs: Sequence[Run]) -> dict[Path, str]:
    """Return the runs that lack an evaluation of another run of their model: all means are over the same runs."""
    reasons = {}
    for run in runs:
        wanted = {subset: None for other in runs if other.model == run.model for subset in other.evaluations}
        if missing := [subset for subset in wanted if subset not in run.evaluations]:
            faults = [f"the evaluation on {subset} {run.faults[subset]}" for subset in missing if subset in run.faults]
            others = f"not evaluated on {' and '.join(missing)}, as another run of its model is"
            reasons[run.folder] = faults[0] if faults else others
    return reasons


def _repeated(runs: Sequence[Run]) -> dict[Path, str]:
    """Return the runs that repeat an earlier one."""
    first: dict[tuple[str, int], Run] = {}
    same = {run.folder: first.setdefault((run.model, run.seed), run).folder for run in runs}
    return {folder: f"same options and seed as {other}" for folder, other in same.items() if other != folder}


def _changed_on_resuming(configs: Sequence[dict[str, Any]]) -> set[str]:
    """Return the options that differ between sessions. The seed counts, too: one training has one seed."""
    sessions = [{**stable(config), "common.seed": config.get("common.seed")} for config in configs]
    keys = {key for session in sessions for key in session}
    return {key for key in keys if any(session.get(key) != sessions[-1].get(key) for session in sessions)}


def _odd_ones(runs: Sequence[Run]) -> dict[Path, str]:
    """Return the runs that were trained or evaluated on other data than most runs, or evaluated differently."""
    circumstances = {run.folder: _circumstances(run) for run in runs}
    reasons: dict[Path, str] = {}
    for name in dict.fromkeys(name for values in circumstances.values() for name in values):
        known = {folder: values[name] for folder, values in circumstances.items() if name in values}
        counts = Counter(known.values())
        usual = max(counts, key=counts.__getitem__)
        for folder, value in known.items():
            if value != usual:
                reasons.setdefault(folder, f"{name} is {value}, in the other runs {usual}")
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


def _contradiction(run: Run) -> "str | None":
    """Return how the evaluated checkpoint (else the best or the last one) in the run's folder contradicts its log.

    None if it does not, if there is no such checkpoint, or if it has no manifest.
    """
    names = [*(evaluation.checkpoint for evaluation in run.evaluations.values()), *USUAL]
    path = next((run.folder / name for name in names if name and (run.folder / name).is_file()), None)
    manifest = _manifest(path) if path else None
    if path is None or manifest is None:
        return None
    record = run.training.model or {}
    for key, words in SAID_BY_BOTH.items():
        saved, logged = getattr(manifest, key), record.get(key)
        if None not in (saved, logged) and saved != logged:
            return f"the {words} is {_short(logged)} in its log, but {_short(saved)} in {path.name}"
    return None


def _manifest(path: Path) -> "Manifest | None":
    try:
        from fairseq_hash.checkpoint.mainfile import read_main
        from fairseq_hash.checkpoint.manifest import Manifest
    except ModuleNotFoundError:
        return None  # reports are made without torch, too
    try:
        return Manifest.of(read_main(path, is_checked=False), path)
    except UserError:
        return None  # the logs are enough without it


def _short(value: object) -> object:
    return value[:12] if isinstance(value, str) and len(value) == 64 else value
