"""Finds the folders of runs: those with a training log directly in them."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fairseq_hash.core.errors import UserError
from fairseq_hash.reporting.endings import last_error

LOG_SUFFIXES = (".log", ".out")
# Hydra's folder of a run has one file per rank; the first file is enough.
OTHER_RANK = re.compile(r"rank0*[1-9]\d*\.log")
# The launcher's own files belong to jobs, not to runs. Hidden folders, such as Hydra's, are left out, too.
SKIPPED = "slurm"
# The configuration, which fairseq-train and fairseq-hydra-train log first.
TRAINING = re.compile(rb"fairseq_cli\.train(?: \| |\]\[INFO\] - )\{")


def log_files(folder: Path) -> list[Path]:
    """Return the logs directly in a folder, by name, without those of other ranks than the first."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in LOG_SUFFIXES and path.is_file())
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}; give a folder that you can read") from None
    return [path for path in paths if not OTHER_RANK.fullmatch(path.name)]


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Return the run folders among the given ones and below them. The inside of a run is not searched.

    Raises `UserError` with one line for a path that is not a folder, a folder without runs, and a run named twice.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give the folders that hold the runs' logs")
        runs = [below for below, is_run in _logs_from(folder) if is_run]
        if not runs:
            raise UserError(_what_it_holds(folder))
        for run in runs:
            if run.resolve() in found:
                raise UserError(f"{run} was given twice; name each run once")
            found[run.resolve()] = run
    return list(found.values())


def find_failed_starts(folders: Sequence[Path]) -> dict[Path, str]:
    """Return the folders, among the given ones and below them, in which a training failed to start, with the reason.

    Their logs are empty or end with an error before the training's first line. A folder with only an evaluation or a
    launcher's output does not count.
    """
    failed = {}
    for folder in (below for given in folders for below, is_run in _logs_from(given) if not is_run):
        for path in log_files(folder):
            if path.stat().st_size == 0:
                failed[folder] = f"its training has written nothing yet ({path.name} is empty)"
            elif error := last_error(path):
                failed[folder] = f"its training did not start: {error}"
    return failed


def _logs_from(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the folders with logs, and whether they hold a training log. Folders inside a run are not searched."""
    logs = log_files(folder)
    is_run = any(map(tells_of_training, logs))
    if logs:
        yield folder, is_run
    if is_run:
        return
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    for name in sorted(names, key=_by_numbers):
        if name != SKIPPED and not name.startswith("."):
            yield from _logs_from(folder / name)


def tells_of_training(path: Path) -> bool:
    """Return whether a file is a training log, or cannot be read."""
    try:
        return TRAINING.search(path.read_bytes()) is not None
    except OSError:
        return True  # reading the run will report why it cannot be read


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """Sort seed2 before seed10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _what_it_holds(folder: Path) -> str:
    needed = "fairseq-train's output in a file such as train.log, or Hydra's rank0.log"
    if names := ", ".join(path.name for path in log_files(folder)):
        return (
            f"{folder} holds no training log ({names}), nor does a folder below it; there must be {needed} (fairseq's "
            "--log-file leaves out what a report needs)"
        )
    return f"{folder} holds no log, and no folder below it a training log; give a folder with {needed}"
