"""The look of figures; each is drawn for a light and for a dark page."""

import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fairseq_hash.reporting.runs import Run

# The order of Okabe and Ito's colours, each dark enough to be read as text on white (WCAG: 4.5 to 1); dashes or markers
# differ as well, because nobody can tell nine such colours apart reliably.
COLOURS = ("#0072B2", "#C24E00", "#007F5C", "#B5478B", "#8A6200", "#6B5BD2", "#882255", "#6B7000", "#332288")
MARKERS = "osD^vPX"
DPI = 144


@dataclass(frozen=True)
class Theme:
    """Colours of paper and ink, and the neutral colour of the dense model."""

    paper: str
    ink: str
    faint: str
    neutral: str
    lighten: float


LIGHT = Theme(paper="#ffffff", ink="#1c2024", faint="#d5d9de", neutral="#5b6570", lighten=0.0)
DARK = Theme(paper="#15181c", ink="#e4e7eb", faint="#3a4149", neutral="#a4adb8", lighten=0.45)


@contextmanager
def styled(theme: Theme) -> Iterator[None]:
    """Draw in the colours of a theme in this context."""
    settings = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.ink),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), theme.paper),
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
        neutral = matplotlib.colors.to_rgb(theme.neutral)
        chosen[model] = neutral if is_dense(runs) else lightened(next(palette), theme)
    return chosen


def styles_of(models: dict[str, list[Run]]) -> dict[str, tuple["int | None", int]]:
    """Return each model's colour and dashes on a page: its index into the palette (None: neutral), and its number."""
    numbers = {True: itertools.count(), False: itertools.count()}
    styles = {}
    for model, runs in models.items():
        number = next(numbers[is_dense(runs)])
        styles[model] = None if is_dense(runs) else number % len(COLOURS), number
    return styles


def some(items: Sequence[Any], count: int) -> list[Any]:
    """Return so many of the items, evenly from the first to the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, count)]


def axis_of_counts(axes: Axes, counts: Sequence[int]) -> None:
    """Make the x axis one of powers of two, from the smallest to the largest of ascending numbers, each marked."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(counts[0] / 1.25, counts[-1] * 1.25)
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())


def lightened(colour: str, theme: Theme) -> tuple[float, ...]:
    """Return a colour of the palette as it appears on a page."""
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    return tuple(rgb + (1 - rgb) * theme.lighten)


def is_dense(runs: list[Run]) -> bool:
    """Return whether a model has no experts."""
    return runs[0].training.model["router"] == "none"


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG, cropped to its content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.12)
    return buffer.getvalue()
