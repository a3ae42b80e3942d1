"""Perplexity against the number of experts as a chart."""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fairseq_hash.reporting.charts import NOT_MEASURED, Chart, Line, axis_of_counts
from fairseq_hash.reporting.comparison_table import measure
from fairseq_hash.reporting.naming import is_dense, router_name, told_apart
from fairseq_hash.reporting.published import PublishedFigure, figures_of, is_comparable
from fairseq_hash.reporting.runs import Run

EXPERTS = "model.num_experts"
SUBSETS = ("valid", "test")  # the first of these on which the runs were evaluated


@dataclass(frozen=True)
class Point:
    """A model's perplexities at its number of experts, one per seed, and the published one that compares with them."""

    experts: int
    perplexities: list[float]
    published: "PublishedFigure | None"

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.perplexities)


def scaling_charts(models: dict[str, list[Run]]) -> list[Chart]:
    """Return one chart: a line for models that differ only in their number of experts, dense models as level lines.

    No chart if no two models differ only in that, or if the runs were not evaluated.
    """
    if (subset := _subset(models)) is None:
        return []
    points_by_line = {name: points for name, points in _lines(models, subset).items() if len(points) > 1}
    if not points_by_line:
        return []
    counts = sorted({point.experts for points in points_by_line.values() for point in points})
    axis = axis_of_counts(counts)
    lines, shown = [], {name: f"{points[-1].mean:.1f}" for name, points in points_by_line.items()}
    for number, (name, points) in enumerate(points_by_line.items()):
        x, y = (np.array([getattr(point, key) for point in points], dtype=float) for key in ("experts", "mean"))
        spread = np.array([(min(point.perplexities), max(point.perplexities)) for point in points], dtype=float)
        lines.append(Line(name, "mean over the seeds", x, y, number, number, spread=spread))
        known = [(point.experts, point.published.perplexity) for point in points if point.published]
        if known:
            lines.append(Line(name, NOT_MEASURED, *np.array(known, dtype=float).T, number, number, "points"))
    for number, (name, runs) in enumerate((name, runs) for name, runs in models.items() if is_dense(runs)):
        point, ends = _point(runs, subset), np.array(axis["x_range"])
        shown[name] = f"{point.mean:.1f}"
        lines.append(Line(name, "mean over the seeds", ends, np.full(2, point.mean), None, number))
        if point.published:
            level = np.full(2, point.published.perplexity)
            lines.append(Line(name, NOT_MEASURED, ends, level, None, number, "faint"))
    values = np.concatenate([line.y if line.spread is None else line.spread.flatten() for line in lines])
    room = 0.08 * (values.max() - values.min() or 1)
    y_range = float(values.min() - room), float(values.max() + room)
    labels = "Experts in a layer", f"{subset.capitalize()} perplexity per token"
    return [Chart("Perplexity by the number of experts", *labels, lines, y_range=y_range, values=shown, **axis)]


def _subset(models: dict[str, list[Run]]) -> "str | None":
    rows = [measure(model, run) for model, runs in models.items() for run in runs]
    known = {subset: [row.get(f"{subset}_perplexity", math.nan) for row in rows] for subset in SUBSETS}
    return next((subset for subset, values in known.items() if all(map(math.isfinite, values))), None)


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
