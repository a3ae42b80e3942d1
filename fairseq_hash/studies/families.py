"""Perplexity by the number of experts: the families of a study, their fits, and where they cross.

A family is the models whose names differ in a number at their end only: `Hash 16` and `Hash 64` are the family `Hash`.
A dense baseline is the point of one expert of each family.
"""

import itertools
import math
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from fairseq_hash.reporting.charts import Chart, Line, axis_of_counts
from fairseq_hash.reporting.comparison_table import NOTHING, count_text
from fairseq_hash.studies.charts import ngram_levels
from fairseq_hash.studies.ngram_lines import NGRAMS, counted
from fairseq_hash.studies.results import ModelResult, Results, mean_of, perplexity
from fairseq_hash.studies.scaling_form import (
    PUBLISHED,
    Coefficients,
    Fit,
    Point,
    crossing_words,
    fit,
    plain_power_law,
)
from fairseq_hash.studies.tables import number

OF_FITS = (
    "The intervals are the chance of the seeds if the form is right. They do not say that it is: compare how far it "
    "misses. A coefficient compares only with that of a fit which holds the same ones. The published ones are of "
    "another text, of 130 billion tokens and of models from 15 million parameters on, and known to us from a secondary "
    "source."
)
LEAST_PUBLISHED = 15_000_000  # parameters
OF_SMALL_SIZES = (
    " Their exponents at this N are carried far out of their range, and stand beside ours for the order of size only."
)
Family = Mapping[int, ModelResult]  # by experts, ascending
BEYOND = 4  # crossings are sought up to this times the most experts that were run


def families_of(results: Results) -> dict[str, Family]:
    """Return the families that have two or more different numbers of experts, {} for a study that is not of scaling."""
    if not results.study.scaling:
        return {}
    found: dict[str, dict[int, ModelResult]] = {}
    for result in results.finished:
        if result.model.family is not None:
            name, experts = result.model.family
            found.setdefault(name, {})[experts] = result
    dense = results.baseline
    if dense.finals and dense.sizes is not None and dense.sizes.experts == 0:
        found = {name: {1: dense, **family} for name, family in found.items()}
    return {name: dict(sorted(family.items())) for name, family in found.items() if len(family) > 1}


def fits_of(results: Results, families: Mapping[str, Family]) -> dict[str, Fit]:
    """Return the fit of each family to its losses on test; N is what a token uses of the baseline."""
    size = size_of(results)
    if size is None:
        return {}
    return {name: fit(_points(family, size)) for name, family in families.items()}


def _points(family: Family, size: int) -> list[Point]:
    return [
        Point(size, experts, nats, seed)
        for experts, result in family.items()
        for seed, nats in result.test_nats.items()
    ]


def size_of(results: Results) -> "int | None":
    """Return N, the active parameters of the baseline, None before its first run."""
    return results.baseline.sizes.active if results.baseline.sizes else None


def scaling_table(results: Results, families: Mapping[str, Family]) -> pd.DataFrame:
    """Return perplexity on test by family and number of experts, and beneath it that of the n-gram models."""
    counts = sorted({experts for family in families.values() for experts in family})
    rows = []
    for name, family in families.items():
        means = {experts: perplexity(mean_of(result.test_nats)).mean for experts, result in family.items()}
        rows.append([name, *(f"{means[experts]:.2f}" if experts in means else NOTHING for experts in counts)])
    if rows:
        rows += [
            [NGRAMS[order], *[f"{np.exp(nats):.2f}"] * len(counts)] for order, nats in counted(results, "test").items()
        ]
    return pd.DataFrame(rows, columns=["Family", *(f"E = {experts}" for experts in counts)])


def miss_of(found: Fit, family: Family, size: int) -> float:
    """Return by which share the perplexity of a fit is off the mean over the seeds, at the E where it is worst."""
    gaps = [mean_of(of.test_nats).mean - found.coefficients.nats(size, experts) for experts, of in family.items()]
    return math.expm1(max(map(abs, gaps)))


def fits_table(results: Results, families: Mapping[str, Family], fits: Mapping[str, Fit]) -> pd.DataFrame:
    """Return the coefficients of each fit and the published ones, and the exponent of E' that they mean at this N."""
    size = size_of(results)
    if not fits or size is None:
        return pd.DataFrame()

    def row(name: str, of: Coefficients, held: Iterable[str] = (), miss: str = NOTHING) -> list[str]:
        most = "none" if math.isinf(of.e_max) else number(of.e_max, 0)
        shown = {key: number(getattr(of, key), 3) for key in ("a", "b", "c", "d", "e_start")} | {"e_max": most}
        return [
            name,
            *(NOTHING if key in held else text for key, text in shown.items()),
            f"{of.exponent(size):.4f}",
            miss,
        ]

    rows = [
        row(name, found.coefficients, found.held, f"{100 * miss_of(found, families[name], size):.1f} %")
        for name, found in fits.items()
    ]
    rows += [row(f"{name}, published", of) for name, of in PUBLISHED.items()]
    columns = ["Router", "a", "b", "c", "d", "E_start", "E_max", "Exponent of E' at this N", "Misses by up to"]
    return pd.DataFrame(rows, columns=columns)


def scaling_charts(results: Results, families: Mapping[str, Family], fits: Mapping[str, Fit]) -> list[Chart]:
    """Return perplexity on test by the number of experts, the fitted form as a faint line."""
    if not families:
        return []
    counts = sorted({experts for family in families.values() for experts in family})
    lines, values = [], {}
    for place, (name, family) in enumerate(families.items()):
        nats = [list(result.test_nats.values()) for result in family.values()]
        means = np.exp([np.mean(own) for own in nats])
        ends = np.exp([(min(own), max(own)) for own in nats])
        x = np.array(list(family), dtype=float)
        lines.append(Line(name, "mean over the seeds", x, means, place, place, "points", spread=ends))
        values[name] = f"{means[-1]:.1f}"
        if name in fits:
            dense_x = np.geomspace(x[0], x[-1], 40)
            fitted = np.exp(fits[name].coefficients.nats(size_of(results), dense_x))
            lines.append(Line(name, "fit", dense_x, fitted, place, place, "faint"))
    axis = axis_of_counts(counts)
    level_lines = ngram_levels(results, "test", axis["x_range"], np.exp)
    lines += level_lines
    values |= {line.name: f"{line.y[0]:.1f}" for line in level_lines}
    every = np.concatenate([line.y if line.spread is None else line.spread.flatten() for line in lines])
    y_range = 0.98 * float(every.min()), 1.02 * float(every.max())
    labels = (
        "Perplexity by the number of experts",
        "Experts in a layer (1: the dense baseline)",
        "Test perplexity per token",
    )
    return [Chart(*labels, lines, y_range=y_range, values=values, **axis)]


def scaling_words(results: Results, families: Mapping[str, Family], fits: Mapping[str, Fit]) -> str:
    """Return the coefficients of each family, what was held and how well it fits, and where each pair crosses."""
    size = size_of(results)
    if not fits or size is None:
        return ""
    said = []
    for name, found in fits.items():
        plain = "That is a plain power law."
        if "e_max" not in found.held:
            plain = f"A plain power law has {_intervals(plain_power_law(_points(families[name], size)))}."
        miss = f"misses the mean perplexity by {100 * miss_of(found, families[name], size):.1f} %"
        said.append(f"{name}: {_intervals(found)}. {plain} At the E where it is worst the fit {miss}.")
    alike: dict[str, list[str]] = {}
    for name, found in fits.items():
        alike.setdefault(found.words(), []).append(name)
    said += [f"{', '.join(names)}: {words}." for words, names in alike.items()]
    said.append(OF_FITS + (OF_SMALL_SIZES if size < LEAST_PUBLISHED else ""))
    most = BEYOND * max((max(family) for family in families.values()), default=1)
    for one, other in itertools.combinations(fits, 2):
        said.append(f"{crossing_words((one, other), fits[one], fits[other], size, most)}.")
    return "\n\n".join(said)


def _intervals(found: Fit) -> str:
    """Return each fitted coefficient with its interval."""
    words = []
    for name, of in found.intervals.items():
        ends = "one seed, no interval" if math.isnan(of.low) else f"95 % interval {_four(of.low)} to {_four(of.high)}"
        words.append(f"{name} = {_four(of.mean)} ({ends})")
    return ", ".join(words)


def _four(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.0f}"  # E_max may have hundreds


def scaling_heading(results: Results) -> str:
    """Return what the table and the fits are."""
    size = size_of(results)
    named = "unknown" if size is None else count_text(size)
    return (
        "Perplexity on test by the number of experts E. The fitted form is that of Clark et al. (2022): "
        "log L = a log N + b log E' + c log N log E' + d, with L in nats, logarithms to base 10. "
        "E' is E, levelled off where more experts help no more. "
        f"N is {named}: the active parameters of the baseline."
    )
