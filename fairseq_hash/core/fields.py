"""Whether values from a file are what the fields of a dataclass say: Python itself does not look."""

import sys
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

LARGEST_INT = 2**63 - 1  # what arrays hold


def wrong_field(record: Any) -> "str | None":
    """Return the name of the first field of a dataclass whose value is not of its type, None if all are."""
    hints = get_type_hints(type(record)).items()
    return next((name for name, kind in hints if not fits(getattr(record, name), kind)), None)


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value, with all that is in it, is of a type such as `dict[str, list[float]]`.

    Whole numbers are floats, too, but truth values are no numbers. A float is finite, an int fits into 64 bits, and a
    text can be written as UTF-8.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if kind in (None, NoneType):
        return value is None
    if kind is int:
        return type(value) is int and -LARGEST_INT - 1 <= value <= LARGEST_INT
    if kind is float:
        return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max
    if kind is str:
        return isinstance(value, str) and (value.isascii() or not any("\ud800" <= sign <= "\udfff" for sign in value))
    if origin is tuple:
        kinds = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is ... else inner
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(fits, value, kinds))
    if origin is list:
        return isinstance(value, list) and all(fits(one, inner[0]) for one in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if is_dataclass(kind):
        return isinstance(value, kind) and wrong_field(value) is None  # type: ignore[arg-type]
    return isinstance(value, kind)
