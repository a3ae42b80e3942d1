"""The learning curves as charts."""

from collections.abc import Sequence

import numpy as np

from fairseq_hash.reporting.charts import NOT_MEASURED, Chart, Line
from fairseq_hash.reporting.naming import styles_of
from fairseq_hash.reporting.published import curve_of, is_comparable
from fairseq_hash.reporting.runs import Run

# With more models, training is not drawn beside validations.
MOST_WITH_TRAINING = 6
SCALES = {
    "updates": ("Perplexity by updates", "Updates"),
    "minutes": ("Perplexity by wall-clock time, validation included", "Minutes"),
}

Curve = dict[str, np.ndarray]


def learning_charts(models: dict[str, list[Run]]) -> list[Chart]:
    """Return perplexity by updates and by wall-clock time; with many models, without training beside validations."""
    curves = {model: [_curves(run) for run in runs] for model, runs in models.items()}
    ends = {model: [valid if len(valid["ppl"]) else train for train, valid in of] for model, of in curves.items()}
    low, high = _perplexity_range([curve for of_model in ends.values() for curve in of_model])
    shown = {model: _published(runs, models) for model, runs in models.items()}
    values = [perplexity for points in shown.values() for _, perplexity in points]
    y_range = min([low, *(0.93 * value for value in values)]), max([high, *values])
    last = {model: f"{np.mean([curve['ppl'][-1] for curve in of_model]):.1f}" for model, of_model in ends.items()}
    charts = []
    for scale, (title, label) in SCALES.items():
        lines = []
        for model, style in styles_of(models).items():
            for run, (train, valid) in zip(models[model], curves[model], strict=True):
                is_checked = len(valid["ppl"]) > 0
                if len(models) <= MOST_WITH_TRAINING or not is_checked:
                    kind = "faint" if is_checked else "strong"
                    lines.append(Line(model, f"training, seed {run.seed}", train[scale], train["ppl"], *style, kind))
                if is_checked:
                    lines.append(Line(model, f"validation, seed {run.seed}", valid[scale], valid["ppl"], *style))
            if shown[model] and scale == "updates":
                lines.append(Line(model, NOT_MEASURED, *np.array(shown[model], dtype=float).T, *style, "points"))
        x_range = 0, 1.02 * max(float(line.x[-1]) for line in lines) or 1
        y_label = "Perplexity per token (log scale)"
        charts.append(Chart(title, label, y_label, lines, x_range, y_range, log_y=True, values=last))
    return charts


def _published(runs: Sequence[Run], models: dict[str, list[Run]]) -> list[tuple[int, float]]:
    """Return published perplexities by update, up to the last update of the longest training."""
    if not is_comparable(runs[0]):
        return []
    longest = max(run.training.updates for others in models.values() for run in others)
    return sorted((update, point.perplexity) for update, point in curve_of(runs).items() if update <= 1.02 * longest)


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


def _perplexity_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """Leave out what is not finite, and the first drop from chance, beside which later differences would vanish."""
    every: list[float] = []
    late: list[float] = []
    for curve in curves:
        finite = np.isfinite(curve["ppl"])
        every += curve["ppl"][finite].tolist()
        late += curve["ppl"][finite & (curve["updates"] >= 0.1 * curve["updates"][-1])].tolist()
    return 0.93 * min(every, default=1.0), 1.05 * max(late or every, default=10.0)
