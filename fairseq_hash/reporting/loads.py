"""The experts' loads, as a figure and as charts of a page."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fairseq_hash.reporting import plots
from fairseq_hash.reporting.charts import Chart, Line
from fairseq_hash.reporting.comparison_table import last_validation, settled_intervals, sparse_layers
from fairseq_hash.reporting.plots import Theme, colours_of, some, styled, styles_of
from fairseq_hash.reporting.runs import Run

# A wider or longer figure would be unreadable.
COLUMNS, MOST_PANELS, MOST_LAYERS = 4, 24, 3
MOST_CHARTS = 6
TITLE_WIDTH = 34

Loads = dict[int, tuple[np.ndarray, "np.ndarray | None"]]


def expert_loads(models: dict[str, list[Run]], theme: Theme) -> "bytes | None":
    """Draw every expert's load divided by the uniform share, sorted, by layer and model; return a PNG.

    Returns None if no run logged its experts' loads (`--log-expert-loads`). Seeds are averaged after sorting. Each
    layer begins a row. If there are many layers, some are shown, evenly from the first to the last.
    """
    shown = {model: layers for model, runs in models.items() if (layers := sorted_loads(runs))}
    if not shown:
        return None
    every = sorted({layer for layers in shown.values() for layer in layers})
    layers = some(every, max(1, min(MOST_LAYERS, MOST_PANELS // len(shown))))
    columns = min(COLUMNS, len(shown))
    rows = [row for layer in layers for row in _rows(layer, shown, columns)]
    with styled(theme):
        figure = Figure(figsize=(max(5.5, 3.6 * columns), 0.9 + 2.5 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), columns, squeeze=False, sharey=True)
        colours = colours_of(models, theme)
        for axes_of_row, row in zip(grid, rows, strict=True):
            for axes, (model, layer) in zip(axes_of_row, row, strict=False):
                _draw_loads(axes, *shown[model][layer], colours[model], theme)
                axes.set_title("\n".join(textwrap.wrap(f"{model}, layer {layer}", TITLE_WIDTH)), color=colours[model])
            for axes in axes_of_row[len(row) :]:
                figure.delaxes(axes)
        grid[0, 0].set_ylim(0, 1.18 * max(axes.dataLim.y1 for axes in figure.axes))
        figure.supxlabel("Experts, by descending load", fontsize="medium")
        figure.supylabel("Load / uniform share", fontsize="medium")
        key = "Bars: training (mean over the run). Dots: validation at its end. Line: every expert the same."
        if len(layers) < len(every):
            key += f" Shown: layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))} of {len(every)} sparse ones."
        figure.text(0.005, -0.005, key, va="top")
        return plots.png(figure)


def load_charts(models: dict[str, list[Run]]) -> list[Chart]:
    """Return every expert's load divided by the uniform share, sorted, as one chart per layer (of many, some)."""
    shown = {model: layers for model, runs in models.items() if (layers := sorted_loads(runs))}
    styles = styles_of(models)
    charts = []
    for layer in some(sorted({layer for layers in shown.values() for layer in layers}), MOST_CHARTS):
        lines, largest = [], {}
        for model, (train, valid) in ((model, layers[layer]) for model, layers in shown.items() if layer in layers):
            largest[model] = f"largest {train[0]:.2f}"
            rank = np.arange(1, len(train) + 1, dtype=float)
            lines.append(Line(model, "training, mean over the run", rank, train, *styles[model]))
            if valid is not None:
                lines.append(Line(model, "validation at its end", rank, valid, *styles[model], "points"))
        most, top = max(len(line.x) for line in lines), max(line.y.max() for line in lines)
        labels = "Experts, by descending load", "Load / uniform share"
        ranges = (0.5, most + 0.5), (0, 1.1 * float(top))
        charts.append(Chart(f"Load of the experts, layer {layer}", *labels, lines, *ranges, values=largest))
    return charts


def _rows(layer: int, shown: dict[str, Loads], columns: int) -> list[list[tuple[str, int]]]:
    """Return the panels of a layer by rows."""
    panels = [(model, layer) for model, layers in shown.items() if layer in layers]
    return [panels[start : start + columns] for start in range(0, len(panels), columns)]


def sorted_loads(runs: Sequence[Run]) -> Loads:
    """Return for each layer the loads divided by the uniform share, in training and validation, descending.

    Each log interval is sorted before the mean is taken: a learned router favours one expert after another, and a mean
    by expert would hide it.
    """
    loads: Loads = {}
    for layer in sparse_layers(runs[0]):
        key = f"layer{layer}_load"
        trained = [[values[key] for values in settled_intervals(run) if key in values] for run in runs]
        if all(trained):
            valid = [last_validation(run)[key] for run in runs if key in last_validation(run)]
            train = np.mean([_relative(shares) for shares in trained], axis=0)
            loads[layer] = (train, _relative(valid) if valid else None)
    return loads


def _relative(shares: Sequence[Any]) -> np.ndarray:
    array = np.sort(np.array(shares, dtype=float), axis=1)[:, ::-1]
    return (array * array.shape[1]).mean(axis=0)


def _draw_loads(axes: Axes, train: np.ndarray, valid: "np.ndarray | None", colour: Any, theme: Theme) -> None:
    rank = np.arange(1, len(train) + 1)
    axes.bar(rank, train, color=colour, alpha=0.75, width=0.82)
    largest = f"largest {train[0]:.2f}"
    if valid is not None:
        axes.plot(rank, valid, linestyle="none", marker="o", markersize=4, color=theme.ink, markeredgecolor=theme.paper)
        largest += f" in training, {valid[0]:.2f} in validation"
    axes.axhline(1, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)))
    paper = {"facecolor": theme.paper, "edgecolor": "none", "pad": 1.5}
    axes.text(0.99, 0.97, largest, transform=axes.transAxes, ha="right", va="top", fontsize=9, bbox=paper)
    axes.set_xticks(sorted({1, *(round(len(train) * part / 4) for part in (1, 2, 3, 4))} - {0}))
    axes.set_xlim(0.3, len(train) + 0.7)
