"""The figures of benchmarks as charts of a page, and the parts of a call as bars."""

from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from fairseq_hash.reporting.benchmarks_files import PARTS, Benchmark, Row
from fairseq_hash.reporting.benchmarks_plots import (
    DENSE,
    MOST_BARS,
    MOST_PANELS,
    Panel,
    bars_of,
    drawn_sum,
    panels_by_experts,
    panels_by_tokens,
    some,
)
from fairseq_hash.reporting.charts import Chart, Line, figures_of
from fairseq_hash.reporting.plots import COLOURS


def charts_by_experts(benchmarks: Sequence[Benchmark]) -> str:
    """Return the chart of time / dense by the number of experts as HTML, "" without any."""
    return _charts(benchmarks, panels_by_experts(benchmarks), lambda row: row.experts, "Experts in a layer")


def charts_by_tokens(benchmarks: Sequence[Benchmark]) -> str:
    """Return the chart of time / dense by the number of tokens as HTML, "" without any."""
    return _charts(benchmarks, panels_by_tokens(benchmarks), lambda row: row.tokens, "Tokens of a call")


def _charts(benchmarks: Sequence[Benchmark], panels: list[Panel], size: Callable[[Row], int], label: str) -> str:
    names = dict.fromkeys(row.plain_candidate for benchmark in benchmarks for row in benchmark.rows)
    names.pop(DENSE, None)
    styles: dict[str, tuple[int | None, int]] = {
        name: (place % len(COLOURS), place) for place, name in enumerate(names)
    }
    styles[DENSE] = None, 0
    charts = []
    for panel in some(panels, MOST_PANELS):
        lines, values, last = [], [], {}
        for candidate, rows in panel.lines(size).items():
            x, y = (
                np.array(column, dtype=float) for column in zip(*((size(row), row.ratio) for row in rows), strict=True)
            )
            lines.append(Line(candidate, "", x, y, *styles[candidate]))
            values += y.tolist()
            last[candidate] = f"{y[-1]:.2f}"
        sizes = sorted({float(size(row)) for row in panel.rows})
        ranges = (sizes[0] / 1.25, sizes[-1] * 1.25), (0.9 * min(values), 1.1 * max(values))
        axes = {"log_x": True, "log_y": True, "x_ticks": sizes}
        charts.append(Chart(panel.title, label, "Time / dense (log scale)", lines, *ranges, **axes, values=last))
    return figures_of(charts) if charts else ""


def bars_of_split(benchmarks: Sequence[Benchmark]) -> str:
    """Return the parts of each call as bars, shares of their sum, with a legend, as HTML; "" if no call was split.

    The tables have the same numbers, so a screen reader skips the bars.
    """
    bars = some(bars_of(benchmarks), MOST_BARS)
    if not bars:
        return ""
    parts = dict.fromkeys((*PARTS, *(part for _, row in bars for part in row.parts)))
    colours = {part: f"var(--c{place % len(COLOURS)})" for place, part in enumerate(parts)}
    used = [part for part in parts if any(row.parts.get(part, 0) > 0 for _, row in bars)]
    legend = "".join(f'<span><i style="background:{colours[part]}"></i>{escape(part)}</span>' for part in used)
    cells = []
    for benchmark, row in bars:
        name = f"{benchmark.name}: {row.candidate}, {row.experts:,} experts, {row.tokens:,} tokens"
        shares = [(part, max(row.parts.get(part, 0), 0) / drawn_sum(row)) for part in used]
        stack = "".join(
            f'<span style="width:{share:.3%};background:{colours[part]}" title="{escape(part)}: {share:.0%}"></span>'
            for part, share in shares
        )
        cells.append(f'<span>{escape(name)}</span><div class="stack">{stack}</div>')
    legend = f'<div class="parts-legend">{legend}</div>'
    return f'<div aria-hidden="true">{legend}<div class="parts">{"".join(cells)}</div></div>'
