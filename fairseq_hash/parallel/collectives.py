"""What ranks tell each other: that they do the same thing, or which of them cannot; and how all end with one line."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from fairseq_hash.core.errors import UserError

Result = TypeVar("Result")


def gather(value: Any) -> list[Any]:
    """Return every rank's `value`, by rank; every rank has to call this."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run_on_all_ranks(work: Callable[[], Result]) -> Result:
    """Do `work`, which must not wait for other ranks, and return its result once every rank has done it.

    Raises:
        UserError: on every rank, where it failed on some: the first such rank, and why.
        Exception: where it failed on every rank: the rank's own error.
    """
    try:
        result = work()
    except Exception as error:
        outcomes = gather(_cause(error))
        if None not in outcomes:
            raise
        _raise_for_first(outcomes, error)
    outcomes = gather(None)
    if any(outcome is not None for outcome in outcomes):
        _raise_for_first(outcomes)
    return result


def _raise_for_first(outcomes: Sequence["str | None"], error: "Exception | None" = None) -> NoReturn:
    """Raise the error of the first rank that has one."""
    rank, cause = next((rank, cause) for rank, cause in enumerate(outcomes) if cause is not None)
    raise UserError(f"rank {rank}: {cause}") from error


def _cause(error: Exception) -> str:
    """Return an error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0]}"


def check_same(record: dict[str, Any]) -> None:
    """Check that every rank has this `record`.

    Raises:
        UserError: on every rank: the first rank that differs from rank 0, in what, and both values.
    """
    records = gather(record)
    for rank, other in enumerate(records):
        for key, value in records[0].items():
            if other.get(key) != value:
                raise UserError(
                    f"rank {rank} has {key} {other.get(key)}, rank 0 has {value}; start every rank with the same "
                    "options, data and table"
                )


def one_line_errors(function: Callable[..., Result]) -> Callable[..., Result]:
    """Turn a `UserError` at a place that fairseq calls into an exit with its one line.

    Upstream: fairseq's commands show every exception as a traceback, `Trainer.load_checkpoint` replaces the message of
    any `Exception`, and Hydra prints its own summary of it. `SystemExit` passes through all three. Where there are
    several ranks, all of them raise the error: rank 0 prints it.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Result:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            line = f"fairseq_hash: {error}"
            if not dist.is_initialized():
                raise SystemExit(line) from error
            if dist.get_rank() == 0:
                print(line, file=sys.stderr, flush=True)
            dist.barrier()  # launchers stop all ranks when one ends: not before the line is out
            raise SystemExit(1) from error

    return call
