"""The report on benchmarks: tables and figures from the JSON files of the programs in benchmarks/."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fairseq_hash.core.files import write_folder
from fairseq_hash.reporting import comparison_table
from fairseq_hash.reporting.benchmarks_files import PARTS, Benchmark, Row, load_benchmarks
from fairseq_hash.reporting.benchmarks_plots import split_of_time, time_by_experts, time_by_tokens
from fairseq_hash.reporting.comparison_table import NOTHING
from fairseq_hash.reporting.drawing import draw
from fairseq_hash.reporting.report import read_note
from fairseq_hash.reporting.theme import LIGHT

COLUMNS = """
Every file comes from one run of one program, whose own text defines its candidates, its peak memory and its parts.
Times are medians with the first and the third quartile of all rounds. / dense is the time divided by that of the dense
model or layer in the same round: the median over the rounds. Tokens are those of one call; in decoding they are the
sentences, each of which gets one more token per step. The parts of a call were measured one by one, so their sum is not
exactly the call; shares are shares of the sum.
"""
PROVENANCE = {**comparison_table.MACHINE, "date": "Date (UTC)"}
# Further values of some rows: heading, form and unit.
FURTHER = {
    "held_bytes": ("Held memory", "{:,.1f} MB", 1e6),
    "state_bytes_planned": ("Planned", "{:,.1f} MB", 1e6),
    "updates_per_second": ("Updates/s", "{:.3g}", 1),
    "tokens_per_second": ("Tokens/s", "{:,.0f}", 1),
    "model_flops_per_second": ("TFLOP/s", "{:.3g}", 1e12),
    "utilisation": ("Of a large product's", "{:.0%}", 1),
    "over_base": ("Updates/s over BASE's", "{:.2f}", 1),
}


def write_benchmarks(files: Sequence[Path], out: Path, title: str, note: "Path | None" = None) -> list[Path]:
    """Write results.csv, results.md and the figures; return their paths.

    Raises `UserError` with one line for a file that no benchmark wrote, before anything is written.
    """
    benchmarks, words = load_benchmarks(files), read_note(note)
    drawn = {"time_by_experts.png": draw(time_by_experts(benchmarks), LIGHT)}
    drawn["time_by_tokens.png"] = draw(time_by_tokens(benchmarks), LIGHT)
    drawn["split_of_time.png"] = split_of_time(benchmarks)
    written: dict[str, bytes] = {name: picture for name, picture in drawn.items() if picture is not None}
    written["results.csv"] = _flat(benchmarks).to_csv(index=False).encode()
    written["results.md"] = _markdown(benchmarks, title, words).encode()
    return write_folder(out, written)


def times(benchmark: Benchmark) -> pd.DataFrame:
    """Return the times of one file as text, with headings and units. Columns without values are left out."""
    rows = [_times_of(row) for row in benchmark.rows]
    headings = dict.fromkeys(heading for row in rows for heading in row)
    return pd.DataFrame([[row.get(heading, NOTHING) for heading in headings] for row in rows], columns=list(headings))


def _times_of(row: Row) -> dict[str, str]:
    spread = f"{1000 * row.seconds:,.2f} ({1000 * row.low:,.2f} to {1000 * row.high:,.2f})"
    shown = {"Candidate": row.candidate, "Experts": f"{row.experts:,}", "Tokens": f"{row.tokens:,}"}
    shown |= {"ms (quartiles)": spread, "/ dense": f"{row.ratio:.2f}"}
    if row.peak_bytes is not None:
        shown["Peak memory"] = f"{row.peak_bytes / 1e6:,.1f} MB"
    for key, (heading, form, unit) in FURTHER.items():
        if isinstance(row.further.get(key), (int, float)):
            shown[heading] = form.format(row.further[key] / unit)
    return shown


def split(benchmark: Benchmark) -> pd.DataFrame:
    """Return the parts of one file's calls as text: milliseconds, and shares of their sum; empty without any."""
    rows = [row for row in benchmark.rows if row.parts]
    further = dict.fromkeys(part for row in rows for part in row.parts if part not in PARTS)
    names = [part for part in (*PARTS, *further) if any(part in row.parts for row in rows)]
    content = []
    for row in rows:
        whole = sum(row.parts.values())
        cells = [
            f"{1000 * row.parts[name]:,.2f} ({row.parts[name] / whole:.0%})" if name in row.parts else NOTHING
            for name in names
        ]
        content.append([row.candidate, f"{row.experts:,}", f"{row.tokens:,}", *cells, f"{1000 * whole:,.2f}"])
    headings = [f"{name.capitalize()}, ms" for name in (*names, "sum")]
    return pd.DataFrame(content, columns=["Candidate", "Experts", "Tokens", *headings])


def _flat(benchmarks: Sequence[Benchmark]) -> pd.DataFrame:
    """Return every number of all files, one row for each file's row."""
    rows = []
    for benchmark in benchmarks:
        for row in benchmark.rows:
            plain = {"file": str(benchmark.path), "benchmark": benchmark.kind, "candidate": row.candidate}
            plain |= {key: getattr(row, key) for key in ("experts", "tokens", "seconds", "low", "high", "ratio")}
            plain |= {"peak_bytes": row.peak_bytes, **{f"part_{name}": value for name, value in row.parts.items()}}
            plain |= {key: value for key, value in row.further.items() if isinstance(value, (int, float, str))}
            rows.append(plain)
    return pd.DataFrame(rows)


def _settings(benchmark: Benchmark) -> str:
    def text(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    return "; ".join(f"{name.replace('_', ' ')} {text(value)}" for name, value in benchmark.settings.items())


def _provenance(benchmarks: Sequence[Benchmark]) -> pd.DataFrame:
    content = []
    for key, heading in PROVENANCE.items():
        values = [benchmark.provenance.get(key) for benchmark in benchmarks]
        shown = [", ".join(map(str, value)) if isinstance(value, list) else value for value in values]
        if any(shown):
            content.append([heading, *(str(value) if value else NOTHING for value in shown)])
    return pd.DataFrame(content, columns=["What", *(benchmark.name for benchmark in benchmarks)])


def _markdown(benchmarks: Sequence[Benchmark], title: str, note: str) -> str:
    parts = [f"# {title}", " ".join(COLUMNS.split())]
    for benchmark in benchmarks:
        parts += [f"## {benchmark.name}", _settings(benchmark), comparison_table.markdown(times(benchmark))]
        parts += [f"- {text}" for text in benchmark.left_out]
        if len(parted := split(benchmark)):
            parts += [f"### {benchmark.name}: where the time goes", comparison_table.markdown(parted)]
    if note.strip():
        parts += ["## What this shows and what not", note.strip()]
    parts += ["## Where this comes from", comparison_table.markdown(_provenance(benchmarks), words=True)]
    return "\n\n".join(part for part in parts if part) + "\n"
