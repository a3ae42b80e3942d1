"""Perplexity by the number of experts: the families of a study, their fits, and where they cross.

A family is the models whose names differ in a number at their end only: `Hash 16` and `Hash 64` are the family `Hash`.
A dense baseline is the point of one expert of each family.
"""

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd

from fairseq_hash.reporting.charts import Chart, Line, axis_of_counts
from fairseq_hash.reporting.comparison_table import NOTHING, count_text
from fairseq_hash.studies.results import ModelResult, Results, mean_of, perplexity
from fairseq_hash.studies.scaling_form import Fit, Point, crossing_words, fit

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
    return {
        name: fit(
            [
                Point(size, experts, nats, seed)
                for experts, result in family.items()
                for seed, nats in result.test_nats.items()
            ]
        )
        for name, family in families.items()
    }


def size_of(results: Results) -> "int | None":
    """Return N, the active parameters of the baseline, None before its first run."""
    return results.baseline.sizes.active if results.baseline.sizes else None


def scaling_table(families: Mapping[str, Family]) -> pd.DataFrame:
    """Return perplexity on test by family and number of experts."""
    counts = sorted({experts for family in families.values() for experts in family})
    rows = []
    for name, family in families.items():
        means = {experts: perplexity(mean_of(result.test_nats)).mean for experts, result in family.items()}
        rows.append([name, *(f"{means[experts]:.2f}" if experts in means else NOTHING for experts in counts)])
    return pd.DataFrame(rows, columns=["Family", *(f"E = {experts}" for experts in counts)])


def scaling_charts(results: Results, families: Mapping[str, Family], fits: Mapping[str, Fit]) -> list[Chart]:
    """Return perplexity on test by the number of experts, the fitted form as a faint line."""
    if not families:
        return []
    counts = sorted({experts for family in families.values() for experts in family})
    lines, values = [], {}
    for number, (name, family) in enumerate(families.items()):
        nats = [list(result.test_nats.values()) for result in family.values()]
        means = np.exp([np.mean(own) for own in nats])
        ends = np.exp([(min(own), max(own)) for own in nats])
        x = np.array(list(family), dtype=float)
        lines.append(Line(name, "mean over the seeds", x, means, number, number, "points", spread=ends))
        values[name] = f"{means[-1]:.1f}"
        if name in fits:
            dense_x = np.geomspace(x[0], x[-1], 40)
            fitted = np.exp(fits[name].coefficients.nats(size_of(results), dense_x))
            lines.append(Line(name, "fit", dense_x, fitted, number, number, "strong"))
    every = np.concatenate([line.y if line.spread is None else line.spread.flatten() for line in lines])
    y_range = 0.98 * float(every.min()), 1.02 * float(every.max())
    labels = (
        "Perplexity by the number of experts",
        "Experts in a layer (1: the dense baseline)",
        "Test perplexity per token",
    )
    return [Chart(*labels, lines, y_range=y_range, values=values, **axis_of_counts(counts))]


def scaling_words(results: Results, families: Mapping[str, Family], fits: Mapping[str, Fit]) -> str:
    """Return for each family what was fitted and the exponent of E, and for each pair where they cross."""
    size = size_of(results)
    said = []
    for name, found in fits.items():
        slope = found.intervals["b"]
        ends = "one seed, no interval" if np.isnan(slope.low) else f"95 % interval {slope.low:.4f} to {slope.high:.4f}"
        said.append(f"{name}: b = {slope.mean:.4f} ({ends}); {found.words()}.")
    most = BEYOND * max((max(family) for family in families.values()), default=1)
    for one, other in itertools.combinations(fits, 2):
        said.append(f"{crossing_words((one, other), fits[one], fits[other], size, most)}.")
    return "\n\n".join(said)


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
