"""Draws charts with matplotlib: every PNG of a report."""

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator

from fairseq_hash.reporting.charts import Chart, some
from fairseq_hash.reporting.theme import DPI, Theme

# A longer figure would be unreadable.
COLUMNS, MOST_PANELS = 2, 12
# More lines cannot be told apart, so the others are drawn faint.
MOST_LABELLED, MOST_MARKERS = 10, 12
MANY_POINTS = 64  # of a hollow line, which are drawn small
MARKERS = "osD^vPX"
STYLES: dict[str, dict[str, Any]] = {
    "strong": {"linewidth": 1.8, "markersize": 5},
    "faint": {"linewidth": 0.9, "alpha": 0.35, "marker": ""},
    "points": {"linestyle": "none", "markersize": 8, "markerfacecolor": "none", "zorder": 4},
}
KEYS = {"strong": "lines", "faint": "faint", "points": "hollow"}
STEPS = (1, 2, 2.5, 5, 10)  # between ticks
# Of labels: a line's height as a share of the axes' height (about 4 inches), and the width in letters.
LINE, WIDTH = 0.052, 30


@contextmanager
def styled(theme: Theme) -> Iterator[None]:
    """Draw in the colours of a theme in this context."""
    settings = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.ink),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), theme.paper),
        **{"axes.edgecolor": theme.faint, "grid.color": theme.faint, "grid.linewidth": 0.6, "axes.grid": True},
        **{"axes.grid.axis": "y", "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
        **{"font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold"},
        **{"axes.titlelocation": "left", "axes.titlepad": 8},
        **{"xtick.major.size": 3, "ytick.major.size": 0, "ytick.minor.size": 0},
    }
    with matplotlib.rc_context(settings):
        yield


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG, cropped to its content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.12)
    return buffer.getvalue()


def draw(charts: Sequence[Chart], theme: Theme) -> "bytes | None":
    """Return charts as one PNG, two in a row, with a key below; None without charts. Of many charts, some are drawn."""
    if not charts:
        return None
    drawn = some(charts, MOST_PANELS)
    columns = min(COLUMNS, len(drawn))
    rows = -(-len(drawn) // columns)
    with styled(theme):
        figure = Figure(figsize=(6.4 * columns, 0.4 + 4.3 * rows), layout="constrained")
        for place, chart in enumerate(drawn, 1):
            _draw(figure.add_subplot(rows, columns, place), chart, theme)
        words = _key(drawn) + (f" Shown: {len(drawn)} of {len(charts)}." if len(drawn) < len(charts) else "")
        figure.text(0.005, -0.005, textwrap.fill(words, 85 * columns), va="top")
        return png(figure)


def labelled(chart: Chart) -> dict[str, tuple["int | None", float, float]]:
    """Return colour, x and y at the end of the lines to label, by name; a mean if lines share the name.

    Of many lines, the neutral ones are labelled (dense models), and then those with the lowest ends.
    """
    ends = {}
    for name in dict.fromkeys(line.name for line in chart.lines):
        named = [line for line in chart.lines if line.name == name]
        own = [line for line in named if line.style == "strong"] or named
        x, y = np.mean([(line.x[-1], line.y[-1]) for line in own], axis=0)
        ends[name] = own[0].colour, float(x), float(y)
    ranked = sorted(ends, key=lambda name: (ends[name][0] is not None, np.nan_to_num(ends[name][2], nan=np.inf)))
    return {name: end for name, end in ends.items() if name in ranked[:MOST_LABELLED]}


def _key(charts: Sequence[Chart]) -> str:
    """Return what lines, faint lines and hollow points are."""
    lines = [line for chart in charts for line in chart.lines]
    styles: dict[str, dict[str, None]] = {}
    for line in lines:
        styles.setdefault(line.what.partition(", seed")[0], {})[KEYS[line.style]] = None
    words = [f"{' and '.join(keys).capitalize()}: {what}." for what, keys in styles.items() if what]
    if any(line.spread is not None for line in lines):
        words.append("Upright: from the lowest seed to the highest.")
    others = max(len({line.name for line in chart.lines}) - len(labelled(chart)) for chart in charts)
    return " ".join([*words, *([f"Grey: {others} more, whose figures stand in the table."] if others else [])])


def _draw(axes: Axes, chart: Chart, theme: Theme) -> None:
    ends = labelled(chart)
    # Stronger lines lie on top.
    for line in sorted(chart.lines, key=lambda line: line.name in ends):
        if line.name in ends:
            every = -(-len(line.x) // MOST_MARKERS) if line.style == "strong" else 1
            style = {"marker": MARKERS[line.dash % len(MARKERS)], "markevery": every, **STYLES[line.style]}
            if line.style == "points" and len(line.x) > MANY_POINTS:
                style["markersize"] = 4
            axes.plot(line.x, line.y, color=theme.colour(line.colour), **style)
            if line.spread is not None:
                axes.vlines(line.x, *line.spread.T, color=theme.colour(line.colour), linewidth=1.5)
        elif line.style == "strong":
            axes.plot(line.x, line.y, color=theme.neutral, alpha=0.5, linewidth=0.8)
    if chart.log_x:
        axes.set_xscale("log", base=2)
    if chart.log_y:
        axes.set_yscale("log")
    axes.set(xlim=chart.x_range, ylim=chart.y_range, xlabel=chart.x_label, ylabel=chart.y_label)
    axes.set_title("\n".join(textwrap.wrap(chart.title, 60)))
    whole = all((line.x % 1 == 0).all() for line in chart.lines)
    axes.xaxis.set_major_locator(FixedLocator(chart.x_ticks) if chart.x_ticks else MaxNLocator(6, integer=whole))
    axes.yaxis.set_major_locator(_log_ticks(*chart.y_range) if chart.log_y else MaxNLocator(6, steps=STEPS))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    _label_ends(axes, chart, ends, theme)


def _log_ticks(low: float, high: float) -> Locator:
    if high < 3 * low:
        return MaxNLocator(6, steps=STEPS)
    factors = (1, 1.5, 2, 3, 5, 7) if high < 30 * low else (1, 2, 5) if high < 1000 * low else (1,)
    return LogLocator(subs=factors)


def _label_ends(axes: Axes, chart: Chart, ends: dict[str, tuple["int | None", float, float]], theme: Theme) -> None:
    """Write each name and its value at its line's end, moved apart if they would overlap.

    A line whose end is not finite has its label at the top.
    """
    top = chart.y_range[1]
    places = [(y if np.isfinite(y) else top, x, theme.colour(colour), name) for name, (colour, x, y) in ends.items()]
    places.sort(key=lambda place: place[0])
    texts = ["\n".join(textwrap.wrap(f"{name} {chart.values.get(name, '')}".strip(), WIDTH)) for *_, name in places]
    to_axes = axes.transScale + axes.transLimits
    wanted = [float(to_axes.transform((x, y))[1]) for y, x, *_ in places]
    heights = spread(wanted, [LINE * (1 + text.count("\n")) for text in texts])
    for (y, x, colour, _), text, height in zip(places, texts, heights, strict=True):
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "relpos": (0, 0.5)}
        style = {"color": colour, "fontweight": "bold", "va": "center", "annotation_clip": False, "arrowprops": arrow}
        axes.annotate(text, (x, y), xytext=(1.05, height), textcoords="axes fraction", **style)


def spread(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Return positions for labels from their wanted positions, in ascending order, without overlap, between 0 and 1.

    They minimise the sum of squared distances from the wanted positions. Measured from a stack in which each label
    touches the next, positions may only rise; if they would fall, the labels concerned share their mean. If there is
    not enough room, labels continue above 1.
    """
    stacked = np.concatenate([[0.0], np.cumsum((np.array(heights[:-1]) + np.array(heights[1:])) / 2)])
    groups: list[list[float]] = []
    for place in np.array(wanted) - stacked[: len(wanted)]:
        groups.append([place])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    risen = np.repeat([np.mean(group) for group in groups], [len(group) for group in groups])
    return list(np.clip(risen, 0, max(0.0, 1 - stacked[-1])) + stacked[: len(wanted)])
