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


def numbers_of(option: str, value: object, kind: str) -> tuple[int, ...]:
    """Return the numbers of a comma-separated list in ascending order; `kind` is what they count, for the messages.

    Raises `UserError` if there is none, one is no number, or one is named twice.
    """
    try:
        numbers = sorted(int(number) for number in str(value).split(",") if number.strip())
    except ValueError:
        raise UserError(f"{option} {value} is not a list of {kind} numbers; give numbers such as 1,3") from None
    if not numbers:
        raise UserError(f"{option} {value} names no {kind}; give numbers such as 1,3")
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{option} {value} names a {kind} twice; name each {kind} once")
    return tuple(numbers)


def layers_of(option: str, value: object, decoder_layers: int) -> tuple[int, ...]:
    """Return the layer numbers of a list as `numbers_of` does, for a decoder that has `decoder_layers` layers."""
    numbers = numbers_of(option, value, "layer")
    for number in numbers:
        if not 0 <= number < decoder_layers:
            raise UserError(
                f"{option} {value}: layer {number} does not exist; the decoder has layers 0 to {decoder_layers - 1}"
            )
    return numbers
