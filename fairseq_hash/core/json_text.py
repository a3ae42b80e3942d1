"""JSON that somebody else wrote: read, or refused by one kind of error."""

import json
from typing import Any


def parse_json(text: "str | bytes") -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: if it is no JSON, or is nested more deeply than Python can read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_object(text: "str | bytes") -> dict[str, Any]:
    """Return the entries of a JSON object. Raises `ValueError` for any other text."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value
