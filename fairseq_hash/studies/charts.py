"""The charts of a study's report, as plain data. Each function returns [] if there is nothing to draw."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from fairseq_hash.reporting.charts import Chart, Line, axis_of_counts
from fairseq_hash.studies.breakdowns import (
    beside_baseline_by_frequency,
    frequency_labels,
    nats_by_position,
    position_ranges,
)
from fairseq_hash.studies.leads import LeadCurve
from fairseq_hash.studies.ngram_lines import NGRAMS, ngrams_of_charts
from fairseq_hash.studies.ngram_lines import beside_baseline_by_frequency as ngrams_by_frequency
from fairseq_hash.studies.records import TUNING, RunRecord, Validation
from fairseq_hash.studies.results import ModelResult, Results, validations_of
from fairseq_hash.studies.tables import number

OVER_SEEDS = "mean over the seeds"
COUNTED = "counted from the training tokens"
# A rate whose loss is further above the best one lies outside of the chart; its figure stands in the table.
MOST_NATS_ABOVE = 0.5


def styles(results: Results) -> dict[str, tuple["int | None", int]]:
    """Return colour and dashes by model: the palette in the study's order, neutral for the baseline if it is dense."""
    sizes = results.baseline.sizes
    neutral = results.baseline.name if sizes is not None and sizes.experts == 0 else None
    coloured = [name for name in results.models if name != neutral]
    found: dict[str, tuple[int | None, int]] = {name: (number, number) for number, name in enumerate(coloured)}
    return found if neutral is None else {**found, neutral: (None, 0)}


def perplexity_charts(results: Results) -> list[Chart]:
    """Return perplexity on valid by tokens, by time and by FLOPs, with the n-gram models as level lines."""
    trained = [result for result in results.finished if not result.model.trained_as and validations_of(result)]
    if not trained:
        return []

    def chart(title: str, label: str, x_of: Callable[[RunRecord, Validation], float], unit: float) -> Chart:
        lines, values = [], {}
        for result in trained:
            x, nats_SN = _validations(result, x_of)
            curve = np.exp(nats_SN.mean(axis=0))
            ends = np.exp(np.stack([nats_SN.min(axis=0), nats_SN.max(axis=0)], axis=1))
            style = styles(results)[result.name]
            lines.append(Line(result.name, OVER_SEEDS, x / unit, curve, *style, spread=ends))
            values[result.name] = f"{curve[-1]:.1f}"
        x_range = 0.0, 1.02 * max(float(line.x[-1]) for line in lines)
        level_lines = ngram_levels(results, "valid", x_range, np.exp)
        lines += level_lines
        values |= {line.name: f"{line.y[0]:.1f}" for line in level_lines}
        y = np.concatenate([line.y for line in lines])
        y_range = 0.95 * float(y.min()), 1.05 * float(y.max())
        y_label = "Valid perplexity per token (log scale)"
        return Chart(title, label, y_label, lines, x_range, y_range, log_y=True, values=values)

    most = max(run.flops_per_token * run.tokens for result in trained for run in result.finals.values())
    power = 3 * int(math.log10(most) // 3)
    return [
        chart("Perplexity by tokens", "Million tokens of training", lambda _, at: at.tokens, 1e6),
        chart("Perplexity by time", "Minutes of training, validation included", lambda _, at: at.seconds, 60),
        chart(
            "Perplexity by FLOPs",
            f"FLOPs of training (10^{power})",
            lambda run, at: run.flops_per_token * at.tokens,
            10.0**power,
        ),
    ]


def ngram_levels(
    results: Results, subset: str, x_range: tuple[float, float], of_nats: Callable[[float], float] = float
) -> list[Line]:
    """Return level lines of the n-gram models that charts show, with what is made of their nats."""
    return [
        Line(NGRAMS[order], COUNTED, np.array(x_range), np.full(2, of_nats(nats)), None, int(order), "faint")
        for order, nats in ngrams_of_charts(results, subset).items()
    ]


def _validations(result: ModelResult, x_of: Callable[[RunRecord, Validation], float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over the seeds of x at each validation, [N], and nats, [S, N]."""
    runs = result.finals.values()
    x_SN = np.array([[x_of(run, at) for at in run.validations] for run in runs], dtype=float)
    return x_SN.mean(axis=0), np.array([[at.nats for at in run.validations] for run in runs])


def lead_charts(
    results: Results, over: ModelResult, curves: dict[str, LeadCurve], of_ngrams: dict[str, LeadCurve]
) -> list[Chart]:
    """Return the lead over a model on valid by tokens; n-gram models, by order, where they are in the models' range."""
    if not curves:
        return []
    lines, values = [], {}
    for name, curve in curves.items():
        lead_N = curve.lead_SN.mean(axis=0)
        ends = np.stack([curve.lead_SN.min(axis=0), curve.lead_SN.max(axis=0)], axis=1)
        style = styles(results)[name]
        lines.append(Line(name, f"{OVER_SEEDS}, paired", curve.tokens / 1e6, lead_N, *style, spread=ends))
        values[name] = f"{number(lead_N[-1], 1)} %"
    x_range = 0.0, 1.02 * max(float(line.x[-1]) for line in lines)
    lines.append(_zero(results, over, x_range))
    y_range = _with_room(lines)
    for order in sorted(ngrams_of_charts(results, "valid").keys() & of_ngrams.keys()):
        curve = of_ngrams[order]
        lead_N = curve.lead_SN.mean(axis=0)
        # Beside a model that has just begun, counting leads by far.
        is_shown_N = (lead_N >= y_range[0]) & (lead_N <= y_range[1])
        if is_shown_N[-2:].all():  # a line that leaves the chart would have its label far from it
            shown_N = np.where(is_shown_N, lead_N, np.nan)
            lines.append(Line(NGRAMS[order], COUNTED, curve.tokens / 1e6, shown_N, None, int(order), "faint"))
            values[NGRAMS[order]] = f"{number(lead_N[-1], 1)} %"
    labels = f"Lead over {over.name} by tokens", "Million tokens of training", "Lower perplexity by (%)"
    return [Chart(*labels, lines, x_range, y_range, values=values)]


def _zero(results: Results, over: ModelResult, x_range: tuple[float, float]) -> Line:
    return Line(over.name, "level of no lead", np.array(x_range), np.zeros(2), *styles(results)[over.name], "faint")


def position_charts(results: Results) -> list[Chart]:
    """Return nats per token by the token's position in its sample."""
    if not results.finished:
        return []
    lasts = [stop for _, stop in position_ranges(results.facts.tokens_per_sample)]
    axis = axis_of_counts(lasts)
    lines, values = [], {}
    for result in results.finished:
        nats = nats_by_position(results, result)
        lines.append(Line(result.name, OVER_SEEDS, np.array(lasts, float), nats, *styles(results)[result.name]))
        values[result.name] = f"{nats[-1]:.2f}"
    level_lines = ngram_levels(results, "test", axis["x_range"])
    lines += level_lines
    values |= {line.name: f"{line.y[0]:.2f}" for line in level_lines}
    labels = "Nats by position in the sample", "Position (the last one of each range)", "Nats per token of test"
    return [Chart(*labels, lines, y_range=_with_room(lines), values=values, **axis)]


def frequency_charts(results: Results) -> list[Chart]:
    """Return nats beside those of the baseline by the token's count in training, n-gram models as hollow points."""
    if not results.baseline.finals:
        return []
    labels = frequency_labels(results.facts)
    x = np.arange(1, len(labels) + 1, dtype=float)
    lines = [_zero(results, results.baseline, (0.8, len(labels) + 0.2))]
    for result in results.finished:
        if result.name != results.baseline.name:
            difference = beside_baseline_by_frequency(results, result)
            if difference is not None:
                lines.append(Line(result.name, OVER_SEEDS, x, difference, *styles(results)[result.name]))
    of_ngrams = ngrams_by_frequency(results)
    shown = ngrams_of_charts(results, "test").keys() & of_ngrams.keys()
    lines += [Line(NGRAMS[order], COUNTED, x, of_ngrams[order], None, int(order), "points") for order in sorted(shown)]
    ranges = ", ".join(f"{number}: {label}" for number, label in enumerate(labels, 1))
    title, y_label = "Nats by the token's count in training", f"Nats per token above those of {results.baseline.name}"
    x_range = float(x[0]) - 0.2, float(x[-1]) + 0.2
    return [Chart(title, f"Count ({ranges})", y_label, lines, x_range, _with_room(lines), x_ticks=x.tolist())]


def tuning_charts(results: Results) -> list[Chart]:
    """Return nats on valid by learning rate. A rate at which the training diverged is a gap, or ends the line."""
    lines, values = [], {}
    for model in results.study.trained():
        choice = results.models[model.name].choice
        ended = [rate for rate, nats in choice.nats.items() if math.isfinite(nats)]
        if not ended:
            continue
        rates = [rate for rate in sorted(choice.nats) if rate <= max(ended)]
        nats = np.array([choice.nats[rate] for rate in rates])
        lines.append(Line(model.name, "one seed", np.array(rates), nats, *styles(results)[model.name]))
        if choice.rate is not None:
            values[model.name] = f"{choice.rate:g}"
    if not lines:
        return []
    rates = sorted({run.learning_rate for run in results.done if run.stage == TUNING})
    axis = axis_of_counts(rates)
    finite = [float(line.y[np.isfinite(line.y)].min()) for line in lines]
    y_range = min(finite) - 0.05, max(finite) + MOST_NATS_ABOVE
    labels = "Valid loss by learning rate", "Learning rate", "Nats per token of valid"
    lines += [line for line in ngram_levels(results, "valid", axis["x_range"]) if y_range[0] <= line.y[0] <= y_range[1]]
    return [Chart(*labels, lines, y_range=y_range, values=values, **axis)]


def _with_room(lines: Sequence[Line]) -> tuple[float, float]:
    """Return a range that shows all finite values, with some room."""
    values = np.concatenate([line.y if line.spread is None else line.spread.flatten() for line in lines])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    room = 0.08 * (high - low) or 0.1
    return low - room, high + room
