"""Checks of options' values: one line each, with the option, what was given and what is allowed."""

from collections.abc import Mapping

from fairseq_hash.core.errors import UserError


def refuse(refusals: Mapping[str, object]) -> None:
    """Raise `UserError` with the first message whose value is true."""
    for message, is_wrong in refusals.items():
        if is_wrong:
            raise UserError(message)


def check_one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `UserError` unless a value is one of those allowed."""
    if value not in allowed:
        raise UserError(f"{option} {value} is unknown; use one of {', '.join(allowed)}")


def check_at_least(option: str, value: float, least: float) -> None:
    """Raise `UserError` unless a value is finite and at least `least`."""
    # Written so that NaN fails too; infinity is no count and no factor.
    if not least <= value < float("inf"):
        raise UserError(f"{option} {value} is out of range; give a number of {least} or more")


def check_probability(option: str, value: float) -> None:
    """Raise `UserError` unless a value is from 0 to less than 1."""
    if not 0 <= value < 1:
        raise UserError(f"{option} {value} is out of range; give a number from 0 to less than 1")
