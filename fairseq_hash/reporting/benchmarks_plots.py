"""The figures of benchmarks: time / dense by the number of experts and of tokens, and the parts of a call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from fairseq_hash.reporting import plots
from fairseq_hash.reporting.benchmarks_files import PARTS, Benchmark, Row
from fairseq_hash.reporting.labels import Label, label_ends
from fairseq_hash.reporting.plots import COLOURS, LIGHT, MARKERS, axis_of_counts, some, styled

DENSE = "dense"
# A longer figure would be unreadable.
COLUMNS, MOST_PANELS, MOST_BARS = 2, 12, 40
# Ticks of ratios in each power of ten, by an upper limit of the largest ratio.
TICKS = {1.4: (1, 1.05, 1.1, 1.2, 1.3, 9), 10: (1, 1.25, 1.5, 2, 3, 5), float("inf"): (1, 2, 5)}


@dataclass(frozen=True)
class Panel:
    """One pair of axes: rows that differ in their candidate and in one size only."""

    title: str
    rows: list[Row]

    def lines(self, size: Callable[[Row], int]) -> dict[str, list[Row]]:
        """Return each candidate's rows by ascending size."""
        lines: dict[str, list[Row]] = {}
        for row in sorted(self.rows, key=size):
            lines.setdefault(row.plain_candidate, []).append(row)
        return lines


def panels_by_experts(benchmarks: Sequence[Benchmark]) -> list[Panel]:
    """Return a panel for each number of tokens. If a file has one number of experts, each candidate has one point."""
    panels = []
    for benchmark in benchmarks:
        varies = len({row.experts for row in benchmark.rows}) > 1
        for (tokens, variant), rows in _grouped(benchmark, lambda row: (row.tokens, row.variant)).items():
            if not varies or len({row.experts for row in rows}) > 1:
                panels.append(Panel(_title(benchmark, _tokens(tokens, variant), variant), rows))
    return panels


def panels_by_tokens(benchmarks: Sequence[Benchmark]) -> list[Panel]:
    """Return a panel for each number of experts that has several numbers of tokens."""
    panels = []
    for benchmark in benchmarks:
        for (experts, variant), rows in _grouped(benchmark, lambda row: (row.experts, row.variant)).items():
            if len({row.tokens for row in rows}) > 1:
                panels.append(Panel(_title(benchmark, f"{experts:,} experts", variant), rows))
    return panels


def time_by_experts(benchmarks: Sequence[Benchmark]) -> "bytes | None":
    """Draw time / dense by the number of experts, a panel for each number of tokens; return a PNG."""
    panels = panels_by_experts(benchmarks)
    return _time(benchmarks, panels, lambda row: row.experts, "Experts in a layer")


def time_by_tokens(benchmarks: Sequence[Benchmark]) -> "bytes | None":
    """Draw time / dense by the number of tokens, a panel for each number of experts; return a PNG.

    Returns None if no file has several numbers of tokens.
    """
    panels = panels_by_tokens(benchmarks)
    return _time(benchmarks, panels, lambda row: row.tokens, "Tokens of a call")


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
    with styled(LIGHT):
        figure = Figure(figsize=(9, 1.5 + 0.34 * len(bars)), layout="constrained")
        axes = figure.subplots()
        axes.grid(False)
        ends = np.zeros(len(bars))
        drawn = [sum(max(value, 0) for value in row.parts.values()) for _, row in bars]
        for index, part in enumerate((*PARTS, *further)):
            shares = 100 * np.array([max(row.parts.get(part, 0), 0) for _, row in bars]) / drawn
            colour = COLOURS[index % len(COLOURS)] if part in PARTS else LIGHT.neutral
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
        return plots.png(figure)


def _time(
    benchmarks: Sequence[Benchmark], panels: list[Panel], size: Callable[[Row], int], label: str
) -> "bytes | None":
    if not panels:
        return None
    count, panels = len(panels), some(panels, MOST_PANELS)
    styles = _styles(benchmarks)
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with styled(LIGHT):
        figure = Figure(figsize=(6.4 * columns, 0.4 + 4.3 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, panel in zip(grid, panels, strict=False):
            _draw(axes, panel.lines(size), size, styles)
            axes.set_title(panel.title)
            axes.set_xlabel(label)
            axes.set_ylabel("Time / dense (log scale)")
        for axes in grid[len(panels) :]:
            figure.delaxes(axes)
        key = "Medians of the ratios within a round; below 1 is faster than dense."
        key += f" Shown: {len(panels)} of {count}." if len(panels) < count else ""
        figure.text(0.005, -0.005, key, va="top")
        return plots.png(figure)


def _draw(
    axes: Axes, lines: dict[str, list[Row]], size: Callable[[Row], int], styles: dict[str, tuple[str, str]]
) -> None:
    sizes = sorted({size(row) for rows in lines.values() for row in rows})
    ratios = [row.ratio for rows in lines.values() for row in rows]
    axis_of_counts(axes, sizes)
    axes.set_yscale("log")
    axes.set_ylim(0.9 * min(ratios), 1.1 * max(ratios))
    ticks = next(ticks for most, ticks in TICKS.items() if max(ratios) < most)
    axes.yaxis.set_major_locator(LogLocator(subs=ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    labels = []
    for candidate, rows in lines.items():
        colour, marker = styles[candidate]
        places, heights = [size(row) for row in rows], [row.ratio for row in rows]
        axes.plot(places, heights, color=colour, marker=marker, markersize=5, linewidth=1.8)
        labels.append(Label(places[-1], heights[-1], f"{candidate} {heights[-1]:.2f}", colour))
    label_ends(axes, labels)


def _styles(benchmarks: Sequence[Benchmark]) -> dict[str, tuple[str, str]]:
    """Return colour and marker of each candidate, the same in every panel; dense is drawn in a neutral colour."""
    names = dict.fromkeys(row.plain_candidate for benchmark in benchmarks for row in benchmark.rows)
    names.pop(DENSE, None)
    styles = {DENSE: (LIGHT.neutral, MARKERS[0])}
    for index, name in enumerate(names):
        styles[name] = COLOURS[index % len(COLOURS)], MARKERS[(index + 1) % len(MARKERS)]
    return styles


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
