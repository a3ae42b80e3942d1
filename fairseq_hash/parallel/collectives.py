"""What ranks tell each other before work starts: that they do the same thing, or which of them cannot."""

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


def together(work: Callable[[], Result]) -> Result:
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
