"""Labels to the right of the axes, at the ends of lines."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

# Heights as shares of the axes' height, for the axes of reports (about 4 inches).
LINE = 0.052
WIDTH = 30  # of a label in letters


@dataclass(frozen=True)
class Label:
    """The end of a line, in data coordinates, and its label."""

    x: float
    y: float
    text: str
    colour: Any


def label_ends(axes: Axes, labels: Sequence[Label]) -> None:
    """Write each label at its line's end, moved apart if they would overlap. Set the limits of the axes first.

    A line whose end is not finite has its label at the top.
    """
    top = axes.get_ylim()[1]
    ends = [(label, label.y if np.isfinite(label.y) else top) for label in labels]
    ends.sort(key=lambda end: end[1])
    texts = ["\n".join(textwrap.wrap(label.text, WIDTH)) for label, _ in ends]
    to_axes = axes.transScale + axes.transLimits
    wanted = [float(to_axes.transform((label.x, y))[1]) for label, y in ends]
    places = spread(wanted, [LINE * (1 + text.count("\n")) for text in texts])
    for (label, y), text, place in zip(ends, texts, places, strict=True):
        axes.annotate(
            *(text, (label.x, y)),
            xytext=(1.05, place),
            xycoords="data",
            textcoords="axes fraction",
            color=label.colour,
            fontweight="bold",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.7, "relpos": (0, 0.5)},
        )


def spread(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Return positions for labels from their wanted positions, in ascending order, without overlap, between 0 and 1.

    They minimise the sum of squared distances from the wanted positions. Measured from a stack in which each label
    touches the next, positions may only rise; if they would fall, the labels concerned share their mean. If there is
    not enough room, labels continue above 1.
    """
    stacked = np.concatenate([[0.0], np.cumsum((np.array(heights[:-1]) + np.array(heights[1:])) / 2)])
    groups: list[list[float]] = []
    for place in np.array(wanted) - stacked[: len(wanted)]:
        groups.append([place])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    risen = np.repeat([np.mean(group) for group in groups], [len(group) for group in groups])
    return list(np.clip(risen, 0, max(0.0, 1 - stacked[-1])) + stacked[: len(wanted)])
