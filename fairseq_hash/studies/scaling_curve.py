"""The form of Clark et al. 2022 for the loss of routed language models, and its least squares.

A. Clark et al., Unified Scaling Laws for Routed Language Models (arXiv 2202.01169): log L = a log N + b log Ê +
c log N log Ê + d, with 1/Ê = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max. L is the loss in nats per token, N the
parameters that a dense twin has, E the number of experts. Logarithms are to base 10, as in that paper: c and d depend
on the base.

Shape suffixes: P points (a run each), K coefficients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares


@dataclass(frozen=True)
class Coefficients:
    """Coefficients of the form, to base 10. E_start 1 and E_max infinite: Ê = E, a plain power law of E."""

    a: float
    b: float
    c: float
    d: float
    e_start: float = 1.0
    e_max: float = math.inf

    def effective_experts(self, experts: "float | np.ndarray") -> "float | np.ndarray":
        """Return Ê: E_start with one expert, and towards E_max with many."""
        saved = 1 / (experts - 1 + 1 / (1 / self.e_start - 1 / self.e_max))
        return 1 / (saved + 1 / self.e_max)

    def exponent(self, dense_parameters: float) -> float:
        """Return the power of Ê to which the loss goes at one N: b + c log N."""
        return self.b + self.c * math.log10(dense_parameters)

    def nats(self, dense_parameters: float, experts: "float | np.ndarray") -> "float | np.ndarray":
        """Return the loss in nats per token."""
        size, effective = math.log10(dense_parameters), np.log10(self.effective_experts(experts))
        return 10 ** (self.a * size + self.b * effective + self.c * size * effective + self.d)


# Mark S: from a secondary source. They give the losses of that source to 0.001 at N = 109 million.
PUBLISHED = {
    "S-BASE": Coefficients(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
    "RL-R": Coefficients(-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
    "HASH": Coefficients(-0.087, -0.136, 0.012, 1.157, 4.175, 477.741),
}


@dataclass(frozen=True)
class Point:
    """A trained model: N, E (1 is the dense twin), nats per token on held-out text, and its seed."""

    dense_parameters: int
    experts: int
    nats: float
    seed: int


def terms_of(points: Sequence[Point], sizes: Sequence[int]) -> tuple[str, ...]:
    """Return the linear coefficients that points determine: each that adds to the rank of those before it."""
    terms: tuple[str, ...] = ()
    for name in "dbac" if len(sizes) > 1 else "db":
        if np.linalg.matrix_rank(design(points, (*terms, name), Coefficients(0, 0, 0, 0))) > len(terms):
            terms = (*terms, name)
    return terms


def design(points: Sequence[Point], terms: Sequence[str], shape: Coefficients) -> np.ndarray:
    """Return what the coefficients multiply, `[P, K]`."""
    size_P = np.log10([point.dense_parameters for point in points])
    effective_P = np.log10(shape.effective_experts(np.array([point.experts for point in points], dtype=float)))
    columns = {"a": size_P, "b": effective_P, "c": size_P * effective_P, "d": np.ones(len(points))}
    return np.column_stack([columns[name] for name in terms])


def least_squares_fit(
    points: Sequence[Point], terms: Sequence[str], bends: bool, start: "Coefficients | None" = None
) -> Coefficients:
    """Return the best coefficients. Given E_start and E_max, all others are linear.

    These two are sought as 1/E_start and E_start/E_max, both from 0 to 1, from several places unless from `start`.
    """
    log_loss_P = np.log10([point.nats for point in points])

    def linear(shape: Coefficients) -> tuple[Coefficients, np.ndarray]:
        design_PK = design(points, terms, shape)
        value_K = np.linalg.lstsq(design_PK, log_loss_P, rcond=None)[0]
        return replace(shape, **dict(zip(terms, value_K.tolist(), strict=True))), design_PK @ value_K - log_loss_P

    def shape_of(inverses: Sequence[float]) -> Coefficients:
        e_start = 1 / float(inverses[0])
        share = float(inverses[1])
        return Coefficients(0, 0, 0, 0, e_start, e_start / share if share > 0 else math.inf)

    def residual(inverses: Sequence[float]) -> np.ndarray:
        return linear(shape_of(inverses))[1]

    best = linear(Coefficients(0, 0, 0, 0))
    if bends:
        most = max(point.experts for point in points)
        low, high = np.array([1 / most, 0]), np.array([1, 0.9])
        guesses = [(1 / e, e / m) for e in (1.2, 3.0) for m in (2.0 * most, 20.0 * most)]
        if start is not None:
            guesses = [(1 / start.e_start, start.e_start / start.e_max)]
        for guess in guesses:
            inside = np.clip(guess, low + 1e-6, high - 1e-6)
            found = least_squares(
                lambda inverses: linear(shape_of(inverses))[1],
                inside,
                bounds=(low, high),
                x_scale=(0.1, 0.01),
                xtol=1e-12,
            )
            best = min(best, linear(shape_of(found.x)), key=lambda candidate: float(candidate[1] @ candidate[1]))
    return best[0]
