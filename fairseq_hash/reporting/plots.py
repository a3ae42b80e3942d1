"""The figures of a report, each drawn for a light and for a dark page."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fairseq_hash.reporting.runs import Run
from fairseq_hash.reporting.table import last_validation, settled_intervals, sparse_layers

# Okabe and Ito's colours, told apart by colour-blind readers; the line styles and markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
DPI = 144


@dataclass(frozen=True)
class Theme:
    """Colours of paper and ink; the dense model is drawn in a neutral colour."""

    paper: str
    ink: str
    faint: str
    neutral: str
    lighten: float


LIGHT = Theme(paper="#ffffff", ink="#1c2024", faint="#d5d9de", neutral="#5b6570", lighten=0.0)
DARK = Theme(paper="#15181c", ink="#e4e7eb", faint="#3a4149", neutral="#a4adb8", lighten=0.3)


@contextmanager
def styled(theme: Theme) -> Iterator[None]:
    """Draw in the colours of a theme in this context."""
    settings = {
        **{key: theme.ink for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")},
        **{key: theme.paper for key in ("figure.facecolor", "axes.facecolor", "savefig.facecolor")},
        **{"axes.edgecolor": theme.faint, "grid.color": theme.faint, "grid.linewidth": 0.6, "axes.grid": True},
        **{"axes.grid.axis": "y", "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
        **{"font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold"},
        **{
            "axes.titlelocation": "left",
            "axes.titlepad": 8,
            "xtick.major.size": 3,
            "ytick.major.size": 0,
            "ytick.minor.size": 0,
        },
    }
    with matplotlib.rc_context(settings):
        yield


def colours_of(models: dict[str, list[Run]], theme: Theme) -> dict[str, Any]:
    """Return each model's colour: a neutral one for a dense model, the palette in order for the others."""
    palette = iter(COLOURS * len(models))
    chosen: dict[str, Any] = {}
    for model, runs in models.items():
        dense = runs[0].training.model["router"] == "none"
        rgb = np.array(matplotlib.colors.to_rgb(theme.neutral if dense else next(palette)))
        chosen[model] = tuple(rgb if dense else rgb + (1 - rgb) * theme.lighten)
    return chosen


def learning_curves(models: dict[str, list[Run]], theme: Theme) -> bytes:
    """Draw perplexity by updates and by wall-clock time, training faint and validation strong; return a PNG."""
    with styled(theme):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        by_updates, by_time = figure.subplots(1, 2, sharey=True)
        colours = colours_of(models, theme)
        ends: dict[Axes, list[tuple[float, float, str, Any]]] = {by_updates: [], by_time: []}
        for index, (model, runs) in enumerate(models.items()):
            curves = [_curves(run) for run in runs]
            for axes, scale in ((by_updates, "updates"), (by_time, "minutes")):
                for train, valid in curves:
                    axes.plot(train[scale], train["ppl"], color=colours[model], alpha=0.35, linewidth=0.9)
                    marker = MARKERS[index % len(MARKERS)]
                    style = {"linewidth": 1.8, "marker": marker, "markersize": 4, "clip_on": False}
                    if len(valid["ppl"]):  # an unclipped line without points would upset the layout
                        axes.plot(valid[scale], valid["ppl"], color=colours[model], **style)
                last = [_end_curve(run) for run in runs]
                x, y = (float(np.mean([curve[name][-1] for curve in last])) for name in (scale, "ppl"))
                ends[axes].append((x, y, f"{model} {y:.1f}", colours[model]))
        low, high = _perplexity_range([_end_curve(run) for runs in models.values() for run in runs])
        by_updates.set_yscale("log")
        by_updates.set_ylim(low, high)
        _plain_log_ticks(by_updates)
        by_updates.set_ylabel("Perplexity per token (log scale)")
        by_updates.set_title("By updates")
        by_updates.set_xlabel("Updates")
        by_time.set_title("By wall-clock time, validation included")
        by_time.set_xlabel("Minutes")
        for axes, labels in ends.items():
            axes.set_xlim(0, 1.02 * axes.dataLim.x1)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=axes is by_updates))
            _label_ends(axes, labels)
        figure.text(
            0.005, -0.005, "Strong lines with markers: validation, with its last value. Faint: training.", va="top"
        )
        return png(figure)


def _curves(run: Run) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return training and validation as arrays `updates`, `minutes` and `ppl`; validation has no clock of its own."""
    steps = sorted(run.training.intervals.items())
    updates = np.array([update for update, _ in steps])
    minutes = np.array([values["wall"] for _, values in steps]) / 60
    train = {"updates": updates, "minutes": minutes, "ppl": np.array([values["ppl"] for _, values in steps])}
    checks = sorted(run.training.validations.items())
    times = np.array([update for update, _ in checks], dtype=float)
    valid = {"updates": times, "ppl": np.array([values["ppl"] for _, values in checks], dtype=float)}
    return train, {**valid, "minutes": np.interp(times, updates, minutes)}


def _end_curve(run: Run) -> dict[str, np.ndarray]:
    """Return the validation's curve, the training's where there was no validation."""
    train, valid = _curves(run)
    return valid if len(valid["ppl"]) else train


def _perplexity_range(curves: Sequence[dict[str, np.ndarray]]) -> tuple[float, float]:
    """Leave out the first fall from chance, beside which all later differences would vanish, and what is not finite."""
    every: list[float] = []
    late: list[float] = []
    for curve in curves:
        finite = np.isfinite(curve["ppl"])
        every += curve["ppl"][finite].tolist()
        late += curve["ppl"][finite & (curve["updates"] >= 0.1 * curve["updates"][-1])].tolist()
    return 0.93 * min(every, default=1.0), 1.05 * max(late or every, default=10.0)


def _plain_log_ticks(axes: Axes) -> None:
    low, high = axes.get_ylim()
    steps = (
        range(1, 10)
        if high / low < 3
        else (1, 2, 3, 5, 7)
        if high / low < 30
        else (1, 2, 5)
        if high / low < 300
        else (1,)
    )
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label_ends(axes: Axes, labels: Sequence[tuple[float, float, str, Any]]) -> None:
    """Write each label right of the axes at its curve's end, moved apart where they would overlap.

    A curve whose end is not finite has its label at the top.
    """
    low, high = np.log(axes.get_ylim())
    labels = [(x, y if np.isfinite(y) else np.exp(high), text, colour) for x, y, text, colour in labels]
    apart = 0.052
    place = -1.0
    for x, y, text, colour in sorted(labels, key=lambda label: label[1]):
        place = max(float((np.log(y) - low) / (high - low)), place + apart, 0.0)
        axes.annotate(
            *(text, (x, y)),
            xytext=(1.05, place),
            xycoords="data",
            textcoords="axes fraction",
            color=colour,
            fontweight="bold",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 2},
        )


def expert_loads(models: dict[str, list[Run]], theme: Theme) -> "bytes | None":
    """Draw every expert's load, sorted, over the uniform share, by layer and model; return a PNG.

    Returns None where no run logged its experts' loads (`--log-expert-loads`). Seeds are averaged after sorting.
    """
    shown = {model: layers for model, runs in models.items() if (layers := _sorted_loads(runs))}
    if not shown:
        return None
    rows = sorted({layer for layers in shown.values() for layer in layers})
    with styled(theme):
        figure = Figure(figsize=(max(5.5, 3.6 * len(shown)), 0.9 + 2.5 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), len(shown), squeeze=False, sharey=True)
        colours = colours_of(models, theme)
        for column, (model, layers) in enumerate(shown.items()):
            for row, layer in enumerate(rows):
                axes = grid[row, column]
                if layer in layers:
                    _draw_loads(axes, *layers[layer], colours[model], theme)
                axes.set_title(f"{model}, layer {layer}", color=colours[model])
            grid[-1, column].set_xlabel("Experts, by descending load")
        for row in range(len(rows)):
            grid[row, 0].set_ylabel("Load / uniform share")
        grid[0, 0].set_ylim(0, 1.18 * max(axes.dataLim.y1 for axes in grid.flat))
        key = "Bars: training (mean over the run). Dots: validation at its end. Line: every expert the same."
        figure.text(0.005, -0.005, key, va="top")
        return png(figure)


def _sorted_loads(runs: Sequence[Run]) -> dict[int, tuple[np.ndarray, "np.ndarray | None"]]:
    """Return by layer the loads over the uniform share in training and validation, descending.

    Each log interval is sorted before the mean is taken: a learned router favours one expert after another, and a mean
    by expert would hide it.
    """
    loads: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
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


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.12)
    return buffer.getvalue()
