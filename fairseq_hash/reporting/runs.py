"""Runs: one training and its evaluations, from the logs in a folder."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.fields import fits
from fairseq_hash.core.json_text import parse_object
from fairseq_hash.reporting.endings import last_error, why_no_result, why_not_done
from fairseq_hash.reporting.folders import find_runs, log_files, tells_of_training
from fairseq_hash.reporting.log_kinds import OF_INTERVAL, OF_RECORD, OF_TRAINING, OF_VALIDATION, require
from fairseq_hash.reporting.logs import Evaluation, Line, TrainingLog, read_evaluations, read_lines, read_training
from fairseq_hash.reporting.run_options import STOPS, stable

RECORD = "run.json"


@dataclass
class Run:
    """One training and its evaluations.

    Attributes:
        folder: the folder as it was given.
        training: the training's log.
        evaluations: for each subset, the last evaluation that counts.
        faults: for each other subset, why its evaluations do not count.
        record: the content of the folder's `run.json`, {} without one; known entries are `commands` (step to list of
            words), `data_fingerprint` and `data` (what the corpus is).
        grown: when the training's log last grew, in seconds since 1970.
        error: the error with which the training's log ends, None if there is none.
    """

    folder: Path
    training: TrainingLog
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    grown: float = field(default=0.0, compare=False)
    error: "str | None" = None

    @property
    def seed(self) -> int:
        """The seed of the training."""
        return self.training.config["common.seed"]

    @property
    def not_done(self) -> "str | None":
        """Why the training is not done, None if it is."""
        return why_not_done(self.training, self.grown, self.error, time.time())

    @property
    def options(self) -> dict[str, Any]:
        """The configuration without options that may differ between two runs of one experiment, but with its stop."""
        return {**stable(self.training.config), **{key: self.training.config[key] for key in STOPS}}

    @property
    def model(self) -> str:
        """The options as text: the same for runs of one model, whatever their seeds."""
        return json.dumps(self.options, sort_keys=True, default=str)


def load_run(folder: Path) -> Run:
    """Read a run folder: its logs, and `run.json` if there is one.

    Raises `UserError` with one line if it holds no training log or cannot be read.
    """
    paths = log_files(folder)
    files = [read_lines(path) for path in paths]
    # A preempted run has one file per session, and a session may be in two files (a redirection and SLURM's own).
    lines: Iterable[Line] = sorted(dict.fromkeys(line for file in files for line in file), key=lambda line: line.time)
    try:
        training = read_training(lines)
        _check_whole(training)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if training is None:
        raise UserError(f"{folder} holds no training log ({', '.join(path.name for path in paths)})")
    run = Run(folder, training, record=_read_record(folder / RECORD))
    evaluations = [one for path, file in zip(paths, files, strict=True) for one in _evaluations(path, file)]
    for one in sorted(evaluations, key=lambda one: one.time):
        fault = why_no_result(one, training)
        if fault is None:
            run.evaluations[one.subset] = one
        else:
            run.faults[one.subset] = fault
    run.faults = {subset: fault for subset, fault in run.faults.items() if subset not in run.evaluations}
    newest = max(filter(tells_of_training, paths), key=lambda path: path.stat().st_mtime)
    run.grown, run.error = newest.stat().st_mtime, last_error(newest)
    return run


def _check_whole(training: "TrainingLog | None") -> None:
    """Raise `UserError` for a log that lacks what reports take for granted."""
    if training is None:
        return
    for config in training.configs:
        require("its configuration", config, OF_TRAINING)
    if training.model is not None:
        require("its model_record", training.model, OF_RECORD)
    for values in training.intervals.values():
        require("a line of its statistics", values, OF_INTERVAL)
    for values in training.validations.values():
        require("a line of its validations", values, OF_VALIDATION)


def _evaluations(path: Path, lines: Sequence[Line]) -> list[Evaluation]:
    try:
        found = read_evaluations(lines)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if found and found[-1].perplexity is None:
        found[-1].error = last_error(path)
    return found


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = parse_object(path.read_text(encoding="utf-8"))
        if not fits(record.get("commands", {}), dict[str, list[str]]):
            raise ValueError("its commands are no lists of words by their step")
        return record
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); repair it or delete it") from None


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs in folders and below them.

    Raises `UserError` if there is no run, if one is given twice, and for runs with more than one dictionary.
    """
    runs = [load_run(folder) for folder in find_runs(folders)]
    dictionaries = {run.training.model["dictionary_fingerprint"]: run for run in runs if run.training.model}
    if len(dictionaries) > 1:
        (one, run), (other, other_run) = list(dictionaries.items())[:2]
        raise UserError(
            f"{run.folder} and {other_run.folder} have different dictionaries ({one[:12]} and {other[:12]}), so their "
            "perplexities do not compare; report them separately"
        )
    return runs
