"""JSON that somebody else wrote: read, or refused by one kind of error."""

import json
import re
from typing import Any

BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


def depth_of(text: str) -> int:
    """Return how many brackets of a text lie within each other, those in quotes included."""
    depth = deepest = 0
    for sign in re.findall(r"[()\[\]{}]", text):
        depth += BRACKETS[sign]
        deepest = max(deepest, depth)
    return deepest


def parse_json(text: "str | bytes") -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: if it is no JSON, is nested more deeply than Python can read, or has half of a character (a lone
            surrogate), which no file can be written with.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_object(text: "str | bytes") -> dict[str, Any]:
    """Return the entries of a JSON object. Raises `ValueError` for any other text."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value
