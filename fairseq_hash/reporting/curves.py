"""The learning curves, as a figure and as charts of a page."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fairseq_hash.reporting import plots
from fairseq_hash.reporting.charts import Chart, Line
from fairseq_hash.reporting.labels import Label, label_ends
from fairseq_hash.reporting.plots import MARKERS, Theme, colours_of, is_dense, styled, styles_of
from fairseq_hash.reporting.published import curve_of, is_comparable
from fairseq_hash.reporting.runs import Run

# More lines cannot be told apart, so the other models are drawn faint, and training is not drawn beside validations.
MOST_LABELLED = 10
MOST_WITH_TRAINING = 6
MOST_MARKERS = 12

Curve = dict[str, np.ndarray]


def learning_curves(models: dict[str, list[Run]], theme: Theme) -> bytes:
    """Draw perplexity by updates and by wall-clock time, training faint and validation strong; return a PNG."""
    strong = {model: models[model] for model in labelled(models)}
    with_training = len(models) <= MOST_WITH_TRAINING
    with styled(theme):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        by_updates, by_time = figure.subplots(1, 2, sharey=True)
        colours = colours_of(strong, theme)
        for axes, scale in ((by_updates, "updates"), (by_time, "minutes")):
            for model, runs in models.items():
                if model not in strong:
                    for run in runs:
                        curve = _end_curve(run)
                        axes.plot(curve[scale], curve["ppl"], color=theme.neutral, alpha=0.5, linewidth=0.8)
            for index, (model, runs) in enumerate(strong.items()):
                _draw(axes, scale, runs, colours[model], MARKERS[index % len(MARKERS)], with_training)
        shown = {model: _published(runs, models) for model, runs in strong.items()}
        for index, (model, points) in enumerate(shown.items()):
            if points:
                style = {"marker": MARKERS[index % len(MARKERS)], "markersize": 8, "markerfacecolor": "none"}
                by_updates.plot(*zip(*points, strict=True), linestyle="none", color=colours[model], zorder=4, **style)
        low, high = _perplexity_range([_end_curve(run) for runs in models.values() for run in runs])
        values = [perplexity for points in shown.values() for _, perplexity in points]
        by_updates.set_yscale("log")
        by_updates.set_ylim(min([low, *(0.93 * value for value in values)]), max([high, *values]))
        _plain_log_ticks(by_updates)
        by_updates.set_ylabel("Perplexity per token (log scale)")
        by_updates.set_title("By updates")
        by_updates.set_xlabel("Updates")
        by_time.set_title("By wall-clock time, validation included")
        by_time.set_xlabel("Minutes")
        for axes, scale in ((by_updates, "updates"), (by_time, "minutes")):
            axes.set_xlim(0, 1.02 * axes.dataLim.x1)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=axes is by_updates))
            label_ends(axes, [_end_label(model, runs, scale, colours[model]) for model, runs in strong.items()])
        figure.text(0.005, -0.005, _key(with_training, len(models) - len(strong), bool(values)), va="top")
        return plots.png(figure)


def learning_charts(models: dict[str, list[Run]]) -> list[Chart]:
    """Return perplexity by updates and by wall-clock time; with many models, without training beside validations."""
    with_training = len(models) <= MOST_WITH_TRAINING
    low, high = _perplexity_range([_end_curve(run) for runs in models.values() for run in runs])
    shown = {model: _published(runs, models) for model, runs in models.items()}
    values = [perplexity for points in shown.values() for _, perplexity in points]
    y_range = min([low, *(0.93 * value for value in values)]), max([high, *values])
    last = {model: f"{np.mean([_end_curve(run)['ppl'][-1] for run in runs]):.1f}" for model, runs in models.items()}
    charts = []
    for title, scale, label in (
        ("Perplexity by updates", "updates", "Updates"),
        ("Perplexity by wall-clock time, validation included", "minutes", "Minutes"),
    ):
        lines = []
        for model, (colour, dash) in styles_of(models).items():
            for run in models[model]:
                train, valid = _curves(run)
                if with_training or not len(valid["ppl"]):
                    style = "faint" if len(valid["ppl"]) else "strong"
                    what = f"training, seed {run.seed}"
                    lines.append(Line(model, what, train[scale], train["ppl"], colour, dash, style))
                if len(valid["ppl"]):
                    what = f"validation, seed {run.seed}"
                    lines.append(Line(model, what, valid[scale], valid["ppl"], colour, dash))
            if shown[model] and scale == "updates":
                x, y = np.array(shown[model], dtype=float).T
                lines.append(Line(model, "published, not measured here", x, y, colour, dash, "points"))
        x_range = 0, 1.02 * max(float(line.x[-1]) for line in lines) or 1
        y_label = "Perplexity per token (log scale)"
        charts.append(Chart(title, label, y_label, lines, x_range, y_range, log_y=True, values=last))
    return charts


def labelled(models: dict[str, list[Run]]) -> list[str]:
    """Return the models to draw strong, in order: dense models first, then those with the lowest perplexity."""

    def rank(model: str) -> tuple[bool, float]:
        last = np.mean([_end_curve(run)["ppl"][-1] for run in models[model]])
        return not is_dense(models[model]), float(last) if np.isfinite(last) else np.inf

    chosen = sorted(models, key=rank)[:MOST_LABELLED] if len(models) > MOST_LABELLED else models
    return [model for model in models if model in chosen]


def _draw(axes: Axes, scale: str, runs: Sequence[Run], colour: object, marker: str, with_training: bool) -> None:
    for train, valid in map(_curves, runs):
        if with_training or not len(valid["ppl"]):
            axes.plot(train[scale], train["ppl"], color=colour, alpha=0.35, linewidth=0.9)
        if len(valid["ppl"]):
            style = {"marker": marker, "markersize": 4, "markevery": -(-len(valid["ppl"]) // MOST_MARKERS)}
            axes.plot(valid[scale], valid["ppl"], color=colour, linewidth=1.8, **style)


def _published(runs: Sequence[Run], models: dict[str, list[Run]]) -> list[tuple[int, float]]:
    """Return published perplexities by update, up to the last update of the longest training."""
    if not is_comparable(runs[0]):
        return []
    longest = max(run.training.updates for others in models.values() for run in others)
    return sorted((update, point.perplexity) for update, point in curve_of(runs).items() if update <= 1.02 * longest)


def _end_label(model: str, runs: Sequence[Run], scale: str, colour: object) -> Label:
    last = [_end_curve(run) for run in runs]
    x, y = (float(np.mean([curve[name][-1] for curve in last])) for name in (scale, "ppl"))
    return Label(x, y, f"{model} {y:.1f}", colour)


def _key(with_training: bool, others: int, with_published: bool) -> str:
    words = ["Lines with markers: validation, with its last value."]
    if with_training:
        words.append("Faint: training.")
    if others:
        words.append(f"Faint: {others} more models, whose figures stand in the table.")
    if with_published:
        words.append("Hollow: published, not measured here.")
    return " ".join(words)


def _curves(run: Run) -> tuple[Curve, Curve]:
    """Return training and validation as arrays `updates`, `minutes` and `ppl`. Validation uses the training's clock."""
    steps = sorted(run.training.intervals.items())
    updates = np.array([update for update, _ in steps])
    minutes = np.array([values["wall"] for _, values in steps]) / 60
    train = {"updates": updates, "minutes": minutes, "ppl": np.array([values["ppl"] for _, values in steps])}
    checks = sorted(run.training.validations.items())
    times = np.array([update for update, _ in checks], dtype=float)
    valid = {"updates": times, "ppl": np.array([values["ppl"] for _, values in checks], dtype=float)}
    return train, {**valid, "minutes": np.interp(times, updates, minutes)}


def _end_curve(run: Run) -> Curve:
    """Return the validation's curve, or the training's if there was no validation."""
    train, valid = _curves(run)
    return valid if len(valid["ppl"]) else train


def _perplexity_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """Leave out the first drop from chance, beside which all later differences would vanish, and values that are not
    finite.
    """
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
        if high / low < 5
        else (1, 2, 3, 5, 7)
        if high / low < 30
        else (1, 2, 5)
        if high / low < 300
        else (1,)
    )
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
