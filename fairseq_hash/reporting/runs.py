"""Run folders, and which of them may be compared: complete, of one dictionary, evaluated alike."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairseq_hash.errors import UserError
from fairseq_hash.reporting.logs import Evaluation, Line, TrainingLog, read_evaluations, read_lines, read_training

LOG_SUFFIXES = (".log", ".out")
RECORD = "run.json"

# What may differ between two runs of one experiment: the seed, places, and what a run tells of itself.
VOLATILE = {
    *("seed", "data", "save_dir", "restore_file", "user_dir", "plasma_path", "max_update", "max_epoch"),
    *("log_file", "log_format", "log_interval", "no_progress_bar", "log_expert_loads"),
    *("tensorboard_logdir", "wandb_project", "azureml_logging", "aim_repo", "aim_run_hash"),
    *("distributed_init_method", "distributed_port", "distributed_rank", "device_id"),
    *("expert_parallel_size", "expert_dispatch"),  # who holds the experts and how rows get there changes no result
}
STOPS = ("optimization.max_update", "optimization.max_epoch")


@dataclass
class Run:
    """One training and its evaluations.

    Attributes:
        folder: as it was given.
        training: the training's log.
        evaluations: the last evaluation of each subset.
        record: what the folder's `run.json` says, {} without one; known are `commands` (step to list of words),
            `data_fingerprint` and `data` (what the corpus is).
    """

    folder: Path
    training: TrainingLog
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """The seed of the training."""
        return self.training.config["common.seed"]

    @property
    def options(self) -> dict[str, Any]:
        """The configuration without what may differ between two runs of one experiment, except when it stops."""
        return {**stable(self.training.config), **{key: self.training.config[key] for key in STOPS}}


def stable(config: dict[str, Any]) -> dict[str, Any]:
    """Return a flat configuration without its volatile options."""
    return {key: value for key, value in config.items() if key.rpartition(".")[2] not in VOLATILE}


def load_run(folder: Path) -> Run:
    """Read a run folder: every `.log` and `.out` file in it, and `run.json` where there is one.

    Raises `UserError` with one line where it is no folder, is empty, holds no training log, or cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folders that hold the runs' logs")
    paths = sorted(path for path in folder.iterdir() if path.suffix in LOG_SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"{folder} holds no log; give a folder with fairseq-train's output in a file such as train.log")
    files = [read_lines(path) for path in paths]
    # A preempted run has a file a session, and the same session may be in two files (a redirection and SLURM's own).
    lines: Iterable[Line] = sorted(dict.fromkeys(line for file in files for line in file), key=lambda line: line.time)
    training = read_training(lines)
    if training is None:
        raise UserError(
            f"{folder} holds no training log ({', '.join(path.name for path in paths)}); redirect fairseq-train's "
            "output there (its --log-file leaves out what a report needs)"
        )
    found = sorted((one for file in files for one in read_evaluations(file)), key=lambda one: one.time)
    return Run(folder, training, {one.subset: one for one in found}, _read_record(folder / RECORD))


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); mend it or delete it") from None


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders. Raises `UserError` for one given twice, and for runs with more than one dictionary."""
    seen: dict[Path, Path] = {}
    for folder in folders:
        if folder.resolve() in seen:
            raise UserError(f"{folder} was given twice; name each run once")
        seen[folder.resolve()] = folder
    runs = [load_run(folder) for folder in folders]
    dictionaries = {run.training.model["dictionary_fingerprint"]: run for run in runs if run.training.model}
    if len(dictionaries) > 1:
        (one, run), (other, other_run) = list(dictionaries.items())[:2]
        raise UserError(
            f"{run.folder} and {other_run.folder} have different dictionaries ({one[:12]} and {other[:12]}), so their "
            "perplexities do not compare; report them apart"
        )
    return runs


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
    first: dict[str, Run] = {}
    for run in complete:
        same = first.setdefault(json.dumps([run.options, run.seed], default=str), run)
        if same is not run:
            reasons[run.folder] = f"same options and seed as {same.folder}"
    return [run for run in complete if run.folder not in reasons], reasons


def why_incomplete(run: Run) -> "str | None":
    """Return why a run cannot be compared with any other, None where it can."""
    training = run.training
    changed = {key for config in training.configs for key in _differences(stable(config), stable(training.config))}
    if training.model is None:
        return "its log has no model_record: trained without --arch hash_transformer_lm"
    if training.finished is None:
        stop = training.config[STOPS[0]]
        return f"training stopped at update {training.updates:,}" + (f" of {stop:,}" if stop else "")
    if changed:
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
    return None


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
