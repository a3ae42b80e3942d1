"""The loads of experts under judged tables, sorted, as charts."""

from collections.abc import Sequence

import numpy as np

from fairseq_hash.reporting.charts import Chart, Line
from fairseq_hash.table_tools.evaluate_balance import HELD_OUT, Judged, JudgedTable

Y_LABEL = "Load / mean load"
MEAN = "mean: every expert the same"


def loads_of_one(table: JudgedTable) -> list[Chart]:
    """Return one chart: the experts of a table by descending load on its first counts.

    The first counts are a line, the others points of the same experts. Level lines show the mean, and for each the
    bound that no table for these keys beats.
    """
    first, *_ = table.judged
    order_E = np.argsort(-first.balance.load_E, kind="stable")
    rank_E, x_range = np.arange(1, len(order_E) + 1, dtype=float), (0.3, len(order_E) + 0.7)
    lines = []
    for number, judged in enumerate(table.judged):
        name = f"{judged.what}: largest {judged.balance.largest_over_mean:.3f}"
        style = "strong" if judged is first else "points"
        lines.append(Line(name, "", rank_E, _over_mean(judged)[order_E], number, number, style))
        bound = judged.balance.bound_over_mean
        name = f"no table's largest load is below {bound:.3f} on {judged.what}"
        lines.append(Line(name, "", np.array(x_range), np.full(2, bound), number, number))
    lines.append(Line(MEAN, "", np.array(x_range), np.ones(2), None))
    label, title = f"Experts, by descending load on {first.what}", f"{table.name}: {len(order_E):,} experts"
    return [Chart(title, label, Y_LABEL, lines, x_range, _from_zero(lines))]


def loads_of_several(tables: Sequence[JudgedTable]) -> list[Chart]:
    """Return the sorted loads of several tables: a chart for the counts and one for held-out text."""
    every = [(number, table.name, judged) for number, table in enumerate(tables) for judged in table.judged]
    charts = []
    for is_held_out in (False, True):
        if group := [one for one in every if (one[2].what == HELD_OUT) == is_held_out]:
            lines = []
            for number, name, judged in group:
                load_E = np.sort(_over_mean(judged))[::-1]
                place_E = (np.arange(len(load_E)) + 0.5) / len(load_E) * 100
                lines.append(Line(name, "", place_E, load_E, number, number))
            lines.append(Line(MEAN, "", np.array([0.0, 100.0]), np.ones(2), None))
            title = ", ".join(dict.fromkeys(judged.what for _, _, judged in group)).capitalize()
            charts.append(Chart(title, "Experts, by descending load, %", Y_LABEL, lines, (0, 100), _from_zero(lines)))
    return charts


def _over_mean(judged: Judged) -> np.ndarray:
    return judged.balance.load_E / judged.balance.mean


def _from_zero(lines: Sequence[Line]) -> tuple[float, float]:
    return 0, 1.08 * float(max(line.y.max() for line in lines))
