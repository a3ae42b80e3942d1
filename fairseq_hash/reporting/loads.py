"""The experts' loads as charts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fairseq_hash.reporting.charts import Chart, Line, some
from fairseq_hash.reporting.comparison_table import last_validation, settled_intervals, sparse_layers
from fairseq_hash.reporting.naming import styles_of
from fairseq_hash.reporting.runs import Run

MOST_CHARTS = 6

Loads = dict[int, tuple[np.ndarray, "np.ndarray | None"]]


def load_charts(models: dict[str, list[Run]]) -> list[Chart]:
    """Return every expert's load divided by the uniform share, sorted, as one chart per layer (of many, some).

    No chart if no run logged its experts' loads (`--log-expert-loads`). Seeds are averaged after sorting.
    """
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
