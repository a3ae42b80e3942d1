"""Labels right of the axes, at the ends of lines."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

# Heights in shares of the axes', for the axes of reports (about 4 inches).
LINE = 0.052
WIDTH = 30  # of a label in letters


@dataclass(frozen=True)
class Label:
    """The end of a line, in the axes' data, and what is written there."""

    x: float
    y: float
    text: str
    colour: Any


def label_ends(axes: Axes, labels: Sequence[Label]) -> None:
    """Write each label at its line's end, moved apart where they would overlap; the limits must be set before.

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
            arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 2},
        )


def spread(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Return places for labels, in ascending order as they are wanted: none overlaps, from 0 up and as far as 1.

    Where there is no room for all, they go on above 1.
    """
    places: list[float] = []
    for index, place in enumerate(wanted):
        least = places[-1] + _apart(heights, index) if places else 0.0
        places.append(max(place, least))
    above = 1.0
    for index in reversed(range(len(places))):
        lowest = sum(_apart(heights, below) for below in range(1, index + 1))
        places[index] = max(min(places[index], above), lowest)
        above = places[index] - (_apart(heights, index) if index else 0.0)
    return places


def _apart(heights: Sequence[float], index: int) -> float:
    """Return the least distance of a label from the one below it."""
    return (heights[index - 1] + heights[index]) / 2
