"""Which folders are runs: those with a training's log directly in them."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fairseq_hash.core.errors import UserError
from fairseq_hash.reporting.endings import last_error

LOG_SUFFIXES = (".log", ".out")
# Hydra's folder of a run has a file a rank; the first one tells all.
OTHER_RANK = re.compile(r"rank0*[1-9]\d*\.log")
# The launcher's own files are of jobs, not of runs; hidden folders, such as Hydra's, are left out as well.
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
    """Return the run folders among the given ones and below them, which are not searched inside a run.

    Raises `UserError` with one line for a folder that is none or holds no run, and for a run that is named twice.
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
    """Return why folders among the given ones and below them hold no run, although one was meant to be there.

    Their logs are empty or end with an error before the training's first line. A folder that holds an evaluation alone,
    or a launcher's output, is none of them.
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
    """Yield the folders with logs, and whether they hold a training's, inside of which is not looked."""
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
    """Return whether a file is a training's log, or cannot be read."""
    try:
        return TRAINING.search(path.read_bytes()) is not None
    except OSError:
        return True  # reading the run will tell why it cannot be read


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
