"""The figures of benchmarks: time / dense by the number of experts and of tokens, and the parts of a call."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fairseq_hash.reporting import drawing
from fairseq_hash.reporting.benchmarks_files import PARTS, Benchmark, Row
from fairseq_hash.reporting.charts import Chart, Line, axis_of_counts, some
from fairseq_hash.reporting.theme import LIGHT

DENSE = "dense"
MOST_BARS = 40  # a longer figure would be unreadable
MEASURED = "median of the ratios within a round; below 1 is faster than dense"


def time_by_experts(benchmarks: Sequence[Benchmark]) -> list[Chart]:
    """Return time / dense by the number of experts, a chart for each number of tokens.

    If a file has one number of experts, each candidate has one point.
    """
    charts = []
    for benchmark in benchmarks:
        varies = len({row.experts for row in benchmark.rows}) > 1
        for (tokens, variant), rows in _grouped(benchmark, lambda row: (row.tokens, row.variant)).items():
            if not varies or len({row.experts for row in rows}) > 1:
                title = _title(benchmark, _tokens(tokens, variant), variant)
                charts.append(_chart(title, "Experts in a layer", rows, "experts", _styles(benchmarks)))
    return charts


def time_by_tokens(benchmarks: Sequence[Benchmark]) -> list[Chart]:
    """Return time / dense by the number of tokens, a chart for each number of experts with several ones of tokens."""
    charts = []
    for benchmark in benchmarks:
        for (experts, variant), rows in _grouped(benchmark, lambda row: (row.experts, row.variant)).items():
            if len({row.tokens for row in rows}) > 1:
                title = _title(benchmark, f"{experts:,} experts", variant)
                charts.append(_chart(title, "Tokens of a call", rows, "tokens", _styles(benchmarks)))
    return charts


def split_of_time(benchmarks: Sequence[Benchmark]) -> "bytes | None":
    """Draw the parts of each call that was split as stacked bars, shares of their sum; return a PNG.

    A part below zero is not drawn (the rest of a call, if its parts took longer when measured alone). Returns None if
    no call was split.
    """
    bars = [(benchmark, row) for benchmark in benchmarks for row in benchmark.rows if row.parts]
    if not bars:
        return None
    count, bars = len(bars), some(bars, MOST_BARS)
    further = dict.fromkeys(part for _, row in bars for part in row.parts if part not in PARTS)
    with drawing.styled(LIGHT):
        figure = Figure(figsize=(9, 1.5 + 0.34 * len(bars)), layout="constrained")
        axes = figure.subplots()
        axes.grid(False)
        ends = np.zeros(len(bars))
        drawn = [sum(max(value, 0) for value in row.parts.values()) for _, row in bars]
        for index, part in enumerate((*PARTS, *further)):
            shares = 100 * np.array([max(row.parts.get(part, 0), 0) for _, row in bars]) / drawn
            colour = LIGHT.colour(index if part in PARTS else None)
            if shares.any():
                axes.barh(range(len(bars)), shares, left=ends, color=colour, label=part, height=0.78)
            ends += shares
        for place, (_, row) in enumerate(bars):
            axes.text(101, place, f"{1000 * sum(row.parts.values()):,.1f} ms", va="center", fontsize=9)
        names = [f"{b.name}: {row.candidate}, {row.experts:,} experts, {row.tokens:,} tokens" for b, row in bars]
        axes.set_yticks(range(len(bars)), names, fontsize=9)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("Share of the parts' sum, %")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, frameon=False)
        if len(bars) < count:
            figure.text(0.005, -0.005, f"Shown: {len(bars)} of {count}.", va="top")
        return drawing.png(figure)


def _chart(title: str, x_label: str, rows: Sequence[Row], size: str, styles: dict[str, Any]) -> Chart:
    """Return a chart of rows that differ in their candidate and in one size only."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        points.setdefault(row.plain_candidate, []).append((getattr(row, size), row.ratio))
    lines = [Line(name, MEASURED, *np.array(sorted(own), dtype=float).T, *styles[name]) for name, own in points.items()]
    y_range = 0.9 * min(row.ratio for row in rows), 1.1 * max(row.ratio for row in rows)
    values = {line.name: f"{line.y[-1]:.2f}" for line in lines}
    axis = axis_of_counts(sorted({getattr(row, size) for row in rows}))
    return Chart(title, x_label, "Time / dense (log scale)", lines, y_range=y_range, log_y=True, values=values, **axis)


def _styles(benchmarks: Sequence[Benchmark]) -> dict[str, tuple["int | None", int]]:
    """Return colour and marker of each candidate, the same in every chart; dense has the neutral colour."""
    names = dict.fromkeys([DENSE, *(row.plain_candidate for benchmark in benchmarks for row in benchmark.rows)])
    return {name: (number - 1 if number else None, number) for number, name in enumerate(names)}


def _grouped(benchmark: Benchmark, key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in benchmark.rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _tokens(tokens: int, variant: str) -> str:
    unit = "sentence" if variant == "decoding" else "token"
    return f"{tokens:,} {unit}{'' if tokens == 1 else 's'}"


def _title(benchmark: Benchmark, size: str, variant: str) -> str:
    return ", ".join([f"{benchmark.name}: {size}", *([variant] if variant else [])])
