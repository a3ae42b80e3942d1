"""The JSON files that the programs in benchmarks/ write with `--json`."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.json_text import parse_json

KINDS = {"layer": "One layer", "train": "Whole trainings", "communication": "Shared experts"}
PARTS = ("route", "gather", "exchange", "experts", "combine")  # of a call, in their order
# Endings of a candidate's name that say what was measured.
VARIANTS = {" decoding": "decoding", ", forward": "forward only"}


@dataclass(frozen=True)
class Row:
    """The measurement of one candidate at one size, experts of a layer and tokens of a call; times in seconds.

    `seconds` is the median, `low` and `high` are the first and the third quartile, `ratio` is the time divided by that
    of dense. `peak_bytes` is None if it was not measured, `parts` (of a call) {} if it was not split. `further` has the
    other values in the file.
    """

    experts: int
    tokens: int
    candidate: str
    seconds: float
    low: float
    high: float
    ratio: float
    peak_bytes: "int | None"
    parts: dict[str, float]
    further: dict[str, Any]

    @property
    def plain_candidate(self) -> str:
        """The candidate's name without the ending that says what was measured."""
        for end in VARIANTS:
            if self.candidate.endswith(end):
                return self.candidate[: -len(end)]
        return self.candidate

    @property
    def variant(self) -> str:
        """The part of the candidate that was measured: "" for a whole call or update."""
        return next((variant for end, variant in VARIANTS.items() if self.candidate.endswith(end)), "")


@dataclass(frozen=True)
class Benchmark:
    """One file: its program, a distinct name, its provenance, and its rows in order."""

    kind: str
    name: str
    path: Path
    provenance: dict[str, Any]
    settings: dict[str, Any]
    left_out: list[str]
    rows: list[Row]


def load_benchmarks(paths: Sequence[Path]) -> list[Benchmark]:
    """Return the contents of the files, in order.

    Raises:
        UserError: with one line that names the file, if it cannot be read, is given twice or was not written by a
            benchmark.
    """
    contents = [_read(path) for path in paths]
    for path, count in Counter(path.resolve() for path in paths).items():
        if count > 1:
            raise UserError(f"{path} was given twice; name each file once")
    kinds = Counter(content["benchmark"] for content in contents)
    stems = Counter((content["benchmark"], path.stem) for content, path in zip(contents, paths, strict=True))
    benchmarks = []
    for path, content in zip(paths, contents, strict=True):
        kind = content["benchmark"]
        told_apart = "" if kinds[kind] == 1 else f" ({path.stem if stems[kind, path.stem] == 1 else path})"
        rows = [_row(path, number, row) for number, row in enumerate(content["rows"], 1)]
        for (candidate, experts, tokens), count in Counter((r.candidate, r.experts, r.tokens) for r in rows).items():
            if count > 1:
                raise _refusal(path, f"{count} rows are of {candidate} with {experts} experts and {tokens} tokens")
        facts = [content.get(key) if isinstance(content.get(key), dict) else {} for key in ("provenance", "settings")]
        left_out = [str(text) for text in content.get("left_out") or []]
        benchmarks.append(Benchmark(kind, KINDS[kind] + told_apart, path, *facts, left_out, rows))
    return benchmarks


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --benchmarks {path}: {error.strerror}; give a JSON file") from None
    except ValueError as error:
        raise _refusal(path, f"it is no JSON ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or content.get("benchmark") not in list(KINDS):  # it may be no text at all
        raise _refusal(path, f'it has no "benchmark" that is one of {", ".join(KINDS)}')
    if not isinstance(content.get("left_out") or [], list):
        raise _refusal(path, 'its "left_out" is no list')
    if not isinstance(content.get("rows"), list) or not content["rows"]:
        raise _refusal(path, 'it has no "rows"')
    return content


def _row(path: Path, number: int, row: Any) -> Row:
    if not isinstance(row, dict):
        raise _refusal(path, f"row {number} is no object")
    given = dict(row)
    candidate = given.pop("candidate", None)
    if not isinstance(candidate, str) or not candidate:
        raise _refusal(path, f'row {number} has no "candidate"')
    for key in ("experts", "tokens"):
        if not isinstance(given.get(key), int) or isinstance(given[key], bool) or given[key] < 1:
            raise _refusal(path, f'row {number} has no "{key}" of 1 or more')
    for key in ("seconds", "low", "high", "ratio"):
        if not _is_number(given.get(key)) or given[key] <= 0:
            raise _refusal(path, f'row {number} has no "{key}" above 0')
    peak = given.pop("peak_bytes", None)
    if peak is not None and (not _is_number(peak) or peak < 0):
        raise _refusal(path, f'row {number} has a "peak_bytes" that is no number of bytes')
    parts = given.pop("parts", None) or {}
    # Some programs give a part's quartiles as well.
    seconds = {
        name: part.get("seconds") if isinstance(part, dict) else part
        for name, part in (parts.items() if isinstance(parts, dict) else [("parts", None)])
    }
    for name, value in seconds.items():
        if not _is_number(value):
            raise _refusal(path, f'row {number} has no seconds of the part "{name}"')
    if seconds and sum(seconds.values()) <= 0:
        raise _refusal(path, f'row {number} has "parts" that take no time')
    sizes = [given.pop(key) for key in ("experts", "tokens")]
    times = [given.pop(key) for key in ("seconds", "low", "high", "ratio")]
    return Row(*sizes, candidate, *times, peak, seconds, given)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _refusal(path: Path, reason: str) -> UserError:
    programs = ", ".join(f"{kind}.py" for kind in KINDS)
    return UserError(f"--benchmarks {path}: {reason}; give a file that a program in benchmarks/ ({programs}) wrote")
