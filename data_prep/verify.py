"""Checks binarized data against what was written: no token may be lost or changed on the way."""

from pathlib import Path
from typing import Any

from fairseq.data import Dictionary

from fairseq_hash.core.errors import UserError

from .binarize import count_symbols


def check_counts(data: Path, dictionary: Path, totals: dict[str, Any], counted: bool) -> None:
    """Compare binarized data (a path without suffix) with the counts of the written split.

    `totals` are the numbers of lines, tokens (without line ends) and unknown tokens that were written; `counted`:
    whether the dictionary's counts are those of this text. Raises `UserError` for the first number that differs.
    """
    symbols = Dictionary.load(str(dictionary))
    lines, tokens, count_V = count_symbols(data, len(symbols))
    special = {name: int(count_V[getattr(symbols, name)()]) for name in ("bos", "pad", "eos", "unk")}
    compared = {
        "lines": (lines, totals["lines"]),
        "tokens with the ends of lines": (tokens, totals["tokens"] + totals["lines"]),
        "tokens in its .bin": (int(count_V.sum()), tokens),
        "ends of lines": (special["eos"], totals["lines"]),
        "unknown tokens": (special["unk"], totals["unknown"]),
        "beginnings and paddings": (special["bos"] + special["pad"], 0),
    }
    if counted:
        found = zip(symbols.symbols, count_V.tolist(), symbols.count, strict=True)
        compared |= {f"times {symbol!r}": pair for symbol, *pair in list(found)[symbols.nspecial :]}
    for what, (found, written) in compared.items():
        if found != written:
            raise UserError(
                f"{data.name} has {found:,} {what}, but {written:,} were written: did the text change meanwhile? "
                f"Delete {data.parent} and run again, and report it if this happens again"
            )
