"""Charts as plain data, which `assets/charts.js` draws on a page and `drawing.py` as a PNG."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from fairseq_hash.reporting.theme import COLOURS

# More points per chart make a page slow, and no screen shows them.
MOST_POINTS = 20_000
DASHES = 4  # kinds that `assets/charts.js` knows
NOT_MEASURED = "published, not measured here"


@dataclass(frozen=True)
class Line:
    """A line: points by ascending `x`. A `y` that is not finite is a gap.

    Attributes:
        name: the name in the legend. Lines with the same name are shown and hidden together.
        what: tells lines with the same name apart ("" if none have), such as "validation, seed 1".
        x: float [N].
        y: float [N].
        colour: number in the palette (`theme.COLOURS`), which goes round, None for the neutral colour of dense models.
        dash: the kind of dashes or markers, any number from 0. Lines with similar colours have different ones.
        style: "strong", "faint", or "points" (hollow, not joined).
        spread: lowest and highest value at each point, float [N, 2], or None.
    """

    name: str
    what: str
    x: np.ndarray
    y: np.ndarray
    colour: "int | None"
    dash: int = 0
    style: str = "strong"
    spread: "np.ndarray | None" = None


@dataclass(frozen=True)
class Chart:
    """Lines, in the legend's order, over two axes whose labels have their units.

    The ranges are those shown before a reader zooms, above 0 if the axis is logarithmic (x to base 2, y to base 10).
    `x_ticks` are the positions of the labels, None for round numbers. `values` are the texts beside the names, in the
    legend or at the lines' ends.
    """

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_x: bool = False
    log_y: bool = False
    x_ticks: "list[float] | None" = None
    values: dict[str, str] = field(default_factory=dict)


def axis_of_counts(counts: Sequence[int]) -> dict[str, Any]:
    """Return the x axis of a `Chart` by powers of two, from the smallest to the largest of ascending numbers."""
    return {"x_range": (counts[0] / 1.25, counts[-1] * 1.25), "log_x": True, "x_ticks": list(map(float, counts))}


def some(items: Sequence[Any], count: int) -> list[Any]:
    """Return so many of the items, evenly from the first to the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, count)]


def figure_of(chart: Chart) -> str:
    """Return a chart as HTML: its heading, and its numbers for the page's script."""
    content = json.dumps(as_json(chart), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # No text in the numbers may end the script element.
    content = content.replace("<", "\\u003c")
    script = f'<script type="application/json">{content}</script>'
    return f'<figure class="chart"><h3>{escape(chart.title)}</h3>{script}</figure>'


def figures_of(charts: Sequence[Chart]) -> str:
    """Return charts as HTML, beside one another if there is room."""
    return f'<div class="charts">{"".join(map(figure_of, charts))}</div>'


def as_json(chart: Chart) -> dict[str, Any]:
    """Return the data for the page's script. Long lines are thinned out, numbers have six digits, gaps are None."""
    most = max(100, MOST_POINTS // max(1, len(chart.lines)))
    content = {"title": chart.title, "xLabel": chart.x_label, "yLabel": chart.y_label}
    content |= {"xRange": list(map(_number, chart.x_range)), "yRange": list(map(_number, chart.y_range))}
    content |= {"logX": chart.log_x, "logY": chart.log_y}
    content["xTicks"] = None if chart.x_ticks is None else list(map(_number, chart.x_ticks))
    return content | {"values": chart.values, "lines": [_line(line, most) for line in chart.lines]}


def _line(line: Line, most: int) -> dict[str, Any]:
    kept = thinned_out(line.y, most)
    content = {"name": line.name, "what": line.what, "style": line.style}
    content |= {"colour": None if line.colour is None else line.colour % len(COLOURS), "dash": line.dash % DASHES}
    content |= {"x": list(map(_number, line.x[kept])), "y": list(map(_number, line.y[kept]))}
    if line.spread is not None:
        content["spread"] = [list(map(_number, ends)) for ends in line.spread[kept]]
    return content


def thinned_out(values: np.ndarray, most: int) -> np.ndarray:
    """Return the indices of the points to keep of a long line, ascending, int [at most `most`].

    The first, the last, and for each stretch the lowest, the highest and a gap if there is one. A line of `most` points
    or fewer keeps all.
    """
    if len(values) <= most:
        return np.arange(len(values))
    finite = np.isfinite(values)
    kept = [np.array([0, len(values) - 1])]
    for stretch in np.array_split(np.arange(len(values)), (most - 2) // 3):
        drawn, gaps = stretch[finite[stretch]], stretch[~finite[stretch]]
        if len(drawn):
            kept.append(drawn[[values[drawn].argmin(), values[drawn].argmax()]])
        kept.append(gaps[:1])
    return np.unique(np.concatenate(kept))


def _number(value: float) -> "float | int | None":
    """Return a number with six digits: a whole number as int, NaN and infinities as None."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.6g}") if abs(value) < 1e6 or value % 1 else value
    return int(rounded) if rounded == int(rounded) else float(rounded)
