"""Mutations of valid files: of their bytes, and of the values that they hold.

A seed is a folder's files by name. A file is bytes, or a `Tree`: values and how they become bytes. Of a tree, either
the values are changed (a key is missing, a number is text, a list is nested), so that the file is well formed and says
something else, or the bytes that it dumps.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

NESTED = "@nested@"  # a dump in text writes brackets in the place of this: 20,000 of them within each other
DEPTH = 20_000
ODD = (
    *(None, True, False, "", " ", "x", "-1", "nan", "1e999", "\x00", "one\nother\r\x1b[31m", "\ud800", "é" * 300, "/"),
    *("../x", "9" * 5000, "a" * 100_000, NESTED, "${x", "${oc.env:HOME}", "!!python/name:os.system"),
    *(-1, 0, 1, 2, 10**6, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e308, -1e308, 1e-320),
    *(float("nan"), float("inf"), -float("inf"), [], {}, [[]], [None], {"": None}, {"x": [1, "a"]}),
)
NUMBERS = (0, 1, -1, 2**31 - 1, -(2**31), 2**32 - 1, 2**40, 2**62, 2**63 - 1, -(2**63), 2**64 - 1)
DIGITS = re.compile(rb"\d+")
TEXTS = (b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\x00", b"\n", b"\r\n", b"\xe2\x80\xa8", b"[" * DEPTH, b"{" * 3000, b"-")
LONG_LINE = b"a" * 300_000


@dataclass(frozen=True)
class Tree:
    """The values of a file, how they become its bytes, and further odd values that its format has."""

    value: Any
    dump: Callable[[Any], bytes]
    odd: tuple[Any, ...] = ()


Seed = dict[str, "bytes | Tree"]


def files_of(seed: Seed) -> dict[str, bytes]:
    """Return the files of a seed as they are."""
    return {name: _dumped(content) for name, content in seed.items()}


def _dumped(content: "bytes | Tree") -> bytes:
    return content.dump(content.value) if isinstance(content, Tree) else content


def mutate(seed: Seed, generator: random.Random) -> dict[str, bytes]:
    """Return the files of a seed, one of them mutated."""
    chosen = generator.choice(list(seed))
    files = {name: _dumped(content) for name, content in seed.items() if name != chosen}
    content = seed[chosen]
    if isinstance(content, Tree) and generator.random() < 0.7:
        value = content.value
        for _ in range(generator.choice((1, 1, 1, 2, 3))):
            value = _changed(value, generator, (*ODD, *content.odd))
        try:
            return {**files, chosen: content.dump(value)}
        except Exception:  # the format cannot say that: bytes are left to change
            pass
    return {**files, chosen: _damaged(_dumped(content), generator)}


def _places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    yield place
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    )
    for key, child in children:
        yield from _places(child, (*place, key))


def _changed(value: Any, generator: random.Random, odd: tuple) -> Any:
    """Return a copy of a value that differs from it in one place."""
    return _at(value, generator.choice(list(_places(value))), generator, odd)


def _at(value: Any, place: tuple, generator: random.Random, odd: tuple) -> Any:
    if not place:
        return _another(value, generator, odd)
    key, *rest = place
    copy = dict(value) if isinstance(value, dict) else list(value)
    if not rest and generator.random() < 0.3:
        if isinstance(copy, dict) and generator.random() < 0.5:
            other = generator.choice((key, "x", "", generator.choice(list(copy)))) if generator.random() < 0.8 else 0
            copy[other] = copy.pop(key)
        elif generator.random() < 0.7:
            del copy[key]
        elif isinstance(copy, list):
            copy.insert(key, copy[key])
    else:
        copy[key] = _at(value[key], tuple(rest), generator, odd)
    return tuple(copy) if isinstance(value, tuple) else copy


def _another(value: Any, generator: random.Random, odd: tuple) -> Any:
    """Return another value: changed a little, or something odd."""
    if generator.random() < 0.4:
        if isinstance(value, bytes):
            return _damaged(value, generator)
        if isinstance(value, bool):
            return not value
        if isinstance(value, (int, float)):
            return generator.choice((value + 1, -value, value * 2**32, str(value), [value], value + 0.5))
        if isinstance(value, str):
            place = generator.randint(0, len(value))
            return value[:place] + str(generator.choice(odd))[:200] + value[place:]
        if isinstance(value, (list, tuple)):
            return generator.choice((list(value) * 2, list(value)[::-1], [value], dict(enumerate(value))))
        if isinstance(value, dict):
            return generator.choice((list(value), list(value.items()), [value], {**value, "x": value}))
    return _damaged(value, generator) if isinstance(value, bytes) else generator.choice(odd)


def _damaged(content: bytes, generator: random.Random) -> bytes:
    """Return bytes with one to four mutations."""
    for _ in range(generator.choice((1, 1, 2, 4))):
        content = generator.choice(BYTE_MUTATIONS)(content, generator)
    return content


def _place(content: bytes, generator: random.Random) -> int:
    """Return a place in the bytes, often near the beginning or the end, where formats have their lengths."""
    most = len(content)
    near = min(most, generator.choice((16, 64, 512, most)))
    return generator.randint(0, near) if generator.random() < 0.7 else most - generator.randint(0, near)


def _span(content: bytes, generator: random.Random) -> tuple[int, int]:
    start = _place(content, generator)
    return start, min(len(content), start + generator.choice((1, 2, 8, 64, 1024)))


def _flip(content: bytes, generator: random.Random) -> bytes:
    place = _place(content, generator)
    return (
        content[:place]
        + bytes(byte ^ 1 << generator.randrange(8) for byte in content[place:][:1])
        + content[place + 1 :]
    )


def _truncate(content: bytes, generator: random.Random) -> bytes:
    return content[: _place(content, generator)]


def _empty(content: bytes, generator: random.Random) -> bytes:
    return b"" if generator.random() < 0.2 else content[1:]


def _insert(content: bytes, generator: random.Random) -> bytes:
    place = _place(content, generator)
    return content[:place] + generator.randbytes(generator.choice((1, 4, 100))) + content[place:]


def _insert_text(content: bytes, generator: random.Random) -> bytes:
    place = _place(content, generator)
    text = LONG_LINE if generator.random() < 0.05 else generator.choice(TEXTS)
    return content[:place] + text + content[place:]


def _remove(content: bytes, generator: random.Random) -> bytes:
    start, end = _span(content, generator)
    return content[:start] + content[end:]


def _duplicate(content: bytes, generator: random.Random) -> bytes:
    start, end = _span(content, generator)
    return content[:end] + content[start:end] * generator.choice((1, 2, 50)) + content[end:]


def _swap(content: bytes, generator: random.Random) -> bytes:
    (a, b), (c, d) = sorted((_span(content, generator), _span(content, generator)))
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:] if b <= c else content[::-1][:d]


def _number(content: bytes, generator: random.Random) -> bytes:
    """Write a number of 1 to 8 bytes over what is there: such as a length, a count or an offset."""
    size, place = generator.choice((1, 2, 4, 8)), _place(content, generator)
    number = generator.choice(NUMBERS) & (1 << 8 * size) - 1
    place -= place % generator.choice((1, size))
    return content[:place] + number.to_bytes(size, generator.choice(("little", "big"))) + content[place + size :]


def _digits(content: bytes, generator: random.Random) -> bytes:
    """Write another number over one that stands there in digits."""
    found = list(DIGITS.finditer(content[:4096])) or list(DIGITS.finditer(content))
    if not found:
        return _number(content, generator)
    one = generator.choice(found)
    text = b"9" * 5000 if generator.random() < 0.1 else str(generator.choice((*NUMBERS, 10**30, 1e999, 0.5))).encode()
    return content[: one.start()] + text + content[one.end() :]


BYTE_MUTATIONS = (_flip, _flip, _truncate, _empty, _insert, _insert_text, _remove, _duplicate, _swap, _number, _digits)
