"""The figures of judged tables: the loads of experts, sorted."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fairseq_hash.reporting.plots import COLOURS, MARKERS, Theme, lightened, png, styled
from fairseq_hash.table_tools.evaluate_balance import HELD_OUT, Judged, JudgedTable

DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1, 1.5)))


def loads_of_one(table: JudgedTable, theme: Theme) -> bytes:
    """Draw the experts of one table by descending load, on building counts and on held-out text; return a PNG.

    Bars show the first counts, dots the second counts of the same experts. Lines show the mean, and the bound that no
    table for these keys beats.
    """
    with styled(theme):
        figure = Figure(figsize=(8.5, 4.2), layout="constrained")
        axes = figure.subplots()
        first, *others = table.judged
        order_E = np.argsort(-first.balance.load_E, kind="stable")
        rank_E = np.arange(1, len(order_E) + 1)
        colour = _colour(0, theme)
        bars = axes.bar(rank_E, _over_mean(first)[order_E], color=colour, alpha=0.75, width=0.82, label=_label(first))
        handles: list[Any] = [bars, _bound(axes, first, colour)]
        for number, judged in enumerate(others, 1):
            colour, size = _colour(number, theme), 4.5 if len(order_E) <= 128 else 2.5
            style: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": size, "color": colour}
            handles += axes.plot(rank_E, _over_mean(judged)[order_E], label=_label(judged), **style)
            handles.append(_bound(axes, judged, colour))
        handles.append(axes.axhline(1, color=theme.ink, linewidth=1, label="mean: every expert the same"))
        _frame(axes, f"Experts, by descending load on {first.what}", f"{table.name}: {len(order_E):,} experts")
        axes.set_xlim(0.3, len(order_E) + 0.7)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=1, frameon=False, fontsize=9)
        return png(figure)


def loads_of_several(tables: Sequence[JudgedTable], theme: Theme) -> bytes:
    """Draw the sorted loads of several tables, a panel for the counts and one for held-out text; return a PNG."""
    every = [(number, table.name, judged) for number, table in enumerate(tables) for judged in table.judged]
    groups = [[one for one in every if (one[2].what == HELD_OUT) == is_held_out] for is_held_out in (False, True)]
    groups = [group for group in groups if group]
    with styled(theme):
        figure = Figure(figsize=(5.8 * len(groups) + 0.4, 4.6), layout="constrained")
        grid = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        handles: dict[str, Any] = {}
        for axes, group in zip(grid, groups, strict=True):
            for number, name, judged in group:
                load_E = np.sort(_over_mean(judged))[::-1]
                place_E = (np.arange(len(load_E)) + 0.5) / len(load_E) * 100
                style: dict[str, Any] = {"linestyle": DASHES[number // len(COLOURS) % len(DASHES)], "linewidth": 1.8}
                style |= {"marker": MARKERS[number % len(MARKERS)], "markersize": 4}
                style["markevery"] = max(len(load_E) // 16, 1)
                (handles[name],) = axes.plot(place_E, load_E, color=_colour(number, theme), **style)
            axes.axhline(1, color=theme.ink, linewidth=1)
            title = ", ".join(dict.fromkeys(judged.what for _, _, judged in group)).capitalize()
            _frame(axes, "Experts, by descending load, %", title)
            axes.set_xlim(0, 100)
            axes.set_ylabel("Load / mean load" if axes is grid[0] else "")
        place: dict[str, Any] = {"loc": "outside lower left", "ncols": min(len(handles), 4)}
        figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=9, **place)
        return png(figure)


def _frame(axes: Axes, x_label: str, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel("Load / mean load")
    axes.set_ylim(0, 1.08 * max(axes.dataLim.y1, 1.0))


def _over_mean(judged: Judged) -> np.ndarray:
    return judged.balance.load_E / judged.balance.mean


def _label(judged: Judged) -> str:
    return f"{judged.what}: largest {judged.balance.largest_over_mean:.3f}"


def _bound(axes: Axes, judged: Judged, colour: Any) -> Line2D:
    bound = judged.balance.bound_over_mean
    label = f"no table's largest load is below {bound:.3f} on {judged.what}"
    return axes.axhline(bound, color=colour, linewidth=1.2, linestyle=(0, (4, 3)), label=label)


def _colour(number: int, theme: Theme) -> tuple[float, ...]:
    return lightened(COLOURS[number % len(COLOURS)], theme)
