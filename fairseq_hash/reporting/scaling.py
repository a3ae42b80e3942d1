"""Perplexity against the number of experts, as a figure and as a chart of a page."""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fairseq_hash.reporting import plots
from fairseq_hash.reporting.charts import Chart, Line
from fairseq_hash.reporting.comparison_table import measure
from fairseq_hash.reporting.labels import Label, label_ends
from fairseq_hash.reporting.naming import router_name, told_apart
from fairseq_hash.reporting.plots import COLOURS, MARKERS, Theme, axis_of_counts, is_dense, lightened, styled
from fairseq_hash.reporting.published import PublishedFigure, figures_of, is_comparable
from fairseq_hash.reporting.runs import Run

EXPERTS = "model.num_experts"
SUBSETS = ("valid", "test")  # the first of these on which the runs were evaluated


@dataclass(frozen=True)
class Point:
    """A model's perplexities at its number of experts, one per seed, and the published perplexity that compares with
    them.
    """

    experts: int
    perplexities: list[float]
    published: "PublishedFigure | None"

    @property
    def mean(self) -> float:
        return statistics.fmean(self.perplexities)


def perplexity_by_experts(models: dict[str, list[Run]], theme: Theme) -> "bytes | None":
    """Draw a line for models that differ only in their number of experts, dense models as level lines; return a PNG.

    Returns None if no two models differ only in that, or if the runs were not evaluated.
    """
    subset, lines = _subset_and_lines(models)
    if not lines:
        return None
    dense = {name: _point(runs, subset) for name, runs in models.items() if is_dense(runs)}
    with styled(theme):
        figure = Figure(figsize=(7.6, 4.6), layout="constrained")
        axes = figure.subplots()
        labels = []
        for index, (name, points) in enumerate(lines.items()):
            colour = lightened(COLOURS[index % len(COLOURS)], theme)
            _draw(axes, points, colour, MARKERS[index % len(MARKERS)])
            labels.append(Label(points[-1].experts, points[-1].mean, f"{name} {points[-1].mean:.1f}", colour))
        counts = sorted({point.experts for points in lines.values() for point in points})
        axis_of_counts(axes, counts)
        for name, point in dense.items():
            axes.axhline(point.mean, color=theme.neutral, linewidth=1.4)
            labels.append(Label(counts[-1] * 1.25, point.mean, f"{name} {point.mean:.1f}", theme.neutral))
            if point.published:
                axes.axhline(point.published.perplexity, color=theme.neutral, linewidth=1.2, linestyle=(0, (1, 2)))
        axes.margins(y=0.08)
        axes.set_xlabel("Experts in a layer")
        axes.set_ylabel(f"{subset.capitalize()} perplexity per token")
        label_ends(axes, labels)
        published = any(point.published for points in [*lines.values(), dense.values()] for point in points)
        figure.text(0.005, -0.005, _key(published), va="top")
        return plots.png(figure)


def scaling_charts(models: dict[str, list[Run]]) -> list[Chart]:
    """Return the same as one chart for a page; no chart if there is no line."""
    subset, points_by_line = _subset_and_lines(models)
    if not points_by_line:
        return []
    counts = sorted({point.experts for points in points_by_line.values() for point in points})
    lines, values, shown = [], [], {name: f"{points[-1].mean:.1f}" for name, points in points_by_line.items()}
    for number, (name, points) in enumerate(points_by_line.items()):
        x, y = (np.array([getattr(point, key) for point in points], dtype=float) for key in ("experts", "mean"))
        spread = np.array([(min(point.perplexities), max(point.perplexities)) for point in points], dtype=float)
        style = number % len(COLOURS), number
        lines.append(Line(name, "mean over the seeds", x, y, *style, spread=spread))
        known = [(point.experts, point.published.perplexity) for point in points if point.published]
        if known:
            lines.append(Line(name, "published, not measured here", *np.array(known, dtype=float).T, *style, "points"))
        values += [*spread.flatten(), *(value for _, value in known)]
    ends = np.array([counts[0] / 1.25, counts[-1] * 1.25])
    for number, (name, runs) in enumerate((name, runs) for name, runs in models.items() if is_dense(runs)):
        point = _point(runs, subset)
        shown[name] = f"{point.mean:.1f}"
        level = {"mean over the seeds": ("strong", point.mean)}
        if point.published:
            level["published, not measured here"] = "faint", point.published.perplexity
        for what, (style, value) in level.items():
            lines.append(Line(name, what, ends, np.full(2, value), None, number, style))
            values.append(value)
    room = 0.08 * (max(values) - min(values) or 1)
    y_range = min(values) - room, max(values) + room
    labels = "Experts in a layer", f"{subset.capitalize()} perplexity per token"
    ticks = list(map(float, counts))
    title = "Perplexity by the number of experts"
    return [Chart(title, *labels, lines, (ends[0], ends[1]), y_range, log_x=True, x_ticks=ticks, values=shown)]


def _subset_and_lines(models: dict[str, list[Run]]) -> tuple["str | None", dict[str, list[Point]]]:
    subset = _subset(models)
    lines = _lines(models, subset) if subset else {}
    return subset, {name: points for name, points in lines.items() if len(points) > 1}


def _draw(axes: Axes, points: Sequence[Point], colour: object, marker: str) -> None:
    counts, means = [point.experts for point in points], [point.mean for point in points]
    whiskers = [
        [point.mean - min(point.perplexities) for point in points],
        [max(point.perplexities) - point.mean for point in points],
    ]
    axes.errorbar(counts, means, whiskers, color=colour, linewidth=1.8, marker=marker, markersize=5, capsize=3)
    known = [(point.experts, point.published.perplexity) for point in points if point.published]
    if known:
        style = {"linestyle": "none", "marker": marker, "markersize": 8, "markerfacecolor": "none", "color": colour}
        axes.plot(*zip(*known, strict=True), **style)


def _key(published: bool) -> str:
    words = "Points: mean over the seeds, with the lowest and the highest. Level: dense."
    return f"{words}\nHollow and dotted: published, not measured here." if published else words


def _subset(models: dict[str, list[Run]]) -> "str | None":
    rows = [measure(model, run) for model, runs in models.items() for run in runs]
    return next((subset for subset in SUBSETS if all(_is_finite(row, subset) for row in rows)), None)


def _is_finite(row: dict[str, object], subset: str) -> bool:
    value = row.get(f"{subset}_perplexity")
    return isinstance(value, (int, float)) and math.isfinite(value)


def _point(runs: Sequence[Run], subset: str) -> Point:
    rows = [measure("", run) for run in runs]
    published = figures_of(runs).get(subset) if is_comparable(runs[0]) else None
    return Point(rows[0]["experts"], [row[f"{subset}_perplexity"] for row in rows], published)


def _lines(models: dict[str, list[Run]], subset: str) -> dict[str, list[Point]]:
    """Return the points of sparse models that differ only in their number of experts, by the line's name."""
    families: dict[str, list[str]] = {}
    for model, runs in models.items():
        if not is_dense(runs):
            rest = {key: value for key, value in runs[0].options.items() if key != EXPERTS}
            families.setdefault(repr(sorted(rest.items())), []).append(model)
    members = list(families.values())
    options = [{**models[names[0]][0].options, EXPERTS: None} for names in members]
    titles = told_apart([_title(names, models) for names in members], options)
    points = [[_point(models[name], subset) for name in names] for names in members]
    return {title: sorted(line, key=lambda point: point.experts) for title, line in zip(titles, points, strict=True)}


def _title(names: Sequence[str], models: dict[str, list[Run]]) -> str:
    """Return the common part of the names if only the number of experts differs in them, else the router's name.

    `Hash 1x64` and `Hash 1x128` are `Hash 1xE`; `Hash num_experts=64` and `Hash num_experts=128` are `Hash`.
    """
    common = set()
    for name in names:
        count = models[name][0].training.model["num_experts"]
        common.add(re.sub(rf"(?<!\d){count}(?!\d)", "E", name).replace(" num_experts=E", ""))
    return common.pop() if len(common) == 1 else router_name(models[names[0]][0])
