"""A router's loss against its number of experts: the form of `scaling_curve` fitted to runs, and where two cross."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from fairseq_hash.core.errors import UserError
from fairseq_hash.studies.scaling_curve import PUBLISHED, Coefficients, Point, design, least_squares_fit, terms_of
from fairseq_hash.studies.statistics import Interval

__all__ = [
    "PUBLISHED",
    "Coefficients",
    "Fit",
    "Point",
    "crossing",
    "crossing_words",
    "fit",
    "plain_power_law",
]

LEAST_EXPERTS_OF_SHAPE = 5  # different E: one more than b, d, E_start and E_max, which a curve over E has
RESAMPLES = 1000
CONFIDENCE = 0.95
GRID = 200  # places at which two curves are compared before a crossing is located exactly


@dataclass(frozen=True)
class Fit:
    """Coefficients of one router.

    Attributes:
        intervals: of each fitted coefficient, 95 %, over the seeds; ends are NaN with one seed. They are the chance of
            the seeds if the form is right, and not that the form may be wrong.
        held: each coefficient that was not fitted, and why.
        sizes: the different N of the points.
        experts: their different E.
        refits: to resampled seeds; None where a resample does not determine what was fitted. Empty with one seed.
    """

    coefficients: Coefficients
    intervals: Mapping[str, Interval]
    held: Mapping[str, str]
    sizes: tuple[int, ...]
    experts: tuple[int, ...]
    seeds: tuple[int, ...]
    refits: "tuple[Coefficients | None, ...]" = field(repr=False)

    def words(self) -> str:
        """Return which coefficients were fitted, and which were held and why."""
        fitted = f"fitted: {', '.join(self.intervals)}"
        reasons = "; ".join(
            f"{name} at {getattr(self.coefficients, name):g} ({why})" for name, why in self.held.items()
        )
        return f"{fitted}; held: {reasons}" if self.held else fitted


def fit(points: Sequence[Point], resamples: int = RESAMPLES, seed: int = 0) -> Fit:
    """Fit the form to a router's runs, least squares of log L, as far as the points determine it.

    With one N, a and c are held at 0, and b and d are those of this N. E_start (1 or more) and E_max are fitted if
    there are 5 different E at one N, else they are held at 1 and infinity, so that Ê = E.

    Intervals: seeds are drawn anew, each with all of its points, because what a seed does to all of its runs is no
    chance that many E would average out, as a covariance of residuals takes it to be. With few seeds percentiles of
    the refits are too close together, so the interval is the estimate ± t sqrt(S / (S - 1)) times the refits' standard
    deviation, t of S - 1 degrees of freedom, S seeds. For E_start and E_max their inverses have it, which are finite.

    Raises:
        UserError: for losses, E or N that are no such, a run given twice, or fewer than 2 different E at one N.
    """
    return _fitted(points, resamples, seed, may_bend=True)


def plain_power_law(points: Sequence[Point], resamples: int = RESAMPLES, seed: int = 0) -> Fit:
    """Fit L = 10^d E^b to a router's runs of one N, least squares of log L, with intervals as `fit` has them.

    Raises:
        UserError: as `fit`, and for points of several N.
    """
    if len(sizes := {point.dense_parameters for point in points}) > 1:
        raise UserError(f"the points have {len(sizes)} different N; give those of one N to a plain power law")
    return _fitted(points, resamples, seed, may_bend=False)


def crossing(
    one: Fit, other: Fit, dense_parameters: int, most_experts: float, least_experts: float = 2
) -> "float | None":
    """Return the (smallest) E where two routers change places, from `least_experts` to `most_experts`, or None.

    From 2 unless told: with one expert there is nothing to route, so that fits nearly meet at E = 1 and may change
    places before 2. The published HASH and S-BASE do, at E = 1.7, and again where it matters, near 512.

    Raises:
        UserError: for a range without width, or an N that is not that of a fit to one N.
    """
    _check_range(one, other, dense_parameters, most_experts, least_experts)
    places = _crossings(one.coefficients, other.coefficients, dense_parameters, most_experts, least_experts)
    return places[0] if places else None


def crossing_words(
    names: tuple[str, str],
    one: Fit,
    other: Fit,
    dense_parameters: int,
    most_experts: float,
    least_experts: float = 2,
) -> str:
    """Return where two routers cross, and in how many refits to resampled seeds they do, as a sentence.

    Fits to the same seeds have refits to the same draws, so that what a seed does to both routers cancels. With few
    seeds the refits vary less than other seeds would: a share near 0 or 100 % says less than it seems to.
    Raises `UserError` as `crossing` does.
    """
    _check_range(one, other, dense_parameters, most_experts, least_experts)
    extent = (dense_parameters, most_experts, least_experts)
    found = _crossings(one.coefficients, other.coefficients, *extent)
    reach, run = f"E = {least_experts:,g} to {most_experts:,g}", max(one.experts[-1], other.experts[-1])
    lower = _better(names, one, other, dense_parameters, least_experts)
    if not found:
        text = f"{names[0]} and {names[1]} do not cross from {reach}"
        text += f" (run: up to {run:,})" if run < most_experts else ""
        text += f": {lower} has the lower loss" if lower else ""
    else:
        upper = names[lower == names[0]]
        text = f"{names[0]} and {names[1]} cross at E = {found[0]:,.0f}: {lower} is better below, {upper} above"
        if found[1:]:
            text += f" until they cross again at E = {' and '.join(f'{place:,.0f}' for place in found[1:])}"
        if found[0] > run:
            text += f" (beyond the E that were run, up to {run:,})"
    # Draws of different seeds are not to be paired: neighbours are independent.
    others = other.refits if one.seeds == other.seeds else other.refits[1:] + other.refits[:1]
    pairs = [pair for pair in zip(one.refits, others, strict=False) if None not in pair]
    if not pairs:
        return f"{text}; one seed, so how sure this is cannot be told"
    places = {pair: _crossings(*pair, *extent) for pair in set(pairs)}
    crossed = [places[pair][0] for pair in pairs if places[pair]]
    text += f"; {100 * len(crossed) / len(pairs):.0f} % of {len(pairs):,} refits to resampled seeds cross in this range"
    if crossed:
        low, high = np.percentile(crossed, [2.5, 97.5])
        text += f", 95 % of these at E = {low:,.0f} to {high:,.0f}"
    return text


def _better(names: tuple[str, str], one: Fit, other: Fit, size: int, experts: float) -> "str | None":
    gap = float(one.coefficients.nats(size, experts) - other.coefficients.nats(size, experts))
    return None if gap == 0 else names[gap > 0]


def _crossings(one: Coefficients, other: Coefficients, size: int, most: float, least: float) -> list[float]:
    """Return each E where the curves change places, from the smallest up."""

    def gap(log_experts: "float | np.ndarray") -> "float | np.ndarray":
        experts = np.exp(log_experts)
        return np.log(one.nats(size, experts)) - np.log(other.nats(size, experts))

    grid = np.linspace(math.log(least), math.log(most), GRID)
    gaps = gap(grid)
    apart = np.flatnonzero(np.abs(gaps) > 1e-12)  # equal curves differ by rounding
    turns = np.flatnonzero(np.diff(np.sign(gaps[apart])))
    ends = [(grid[apart[turn]], grid[apart[turn + 1]]) for turn in turns]
    return [math.exp(brentq(gap, *between)) for between in ends]


def _fitted(points: Sequence[Point], resamples: int, seed: int, may_bend: bool) -> Fit:
    _check_points(points)
    sizes, experts, seeds = (
        tuple(sorted({getattr(point, name) for point in points})) for name in ("dense_parameters", "experts", "seed")
    )
    most = _most_experts_at_one_size(points)
    bends = may_bend and most >= LEAST_EXPERTS_OF_SHAPE
    terms, held = terms_of(points, sizes), {}
    for name in sorted({"a", "c"} - set(terms)):
        held[name] = "the points have one N" if len(sizes) == 1 else "no two N have 2 different E each"
    if not bends:
        few = f"{most} different E at one N, {LEAST_EXPERTS_OF_SHAPE} are needed" if may_bend else "a plain power law"
        held |= dict.fromkeys(("e_start", "e_max"), few)
    coefficients = least_squares_fit(points, terms, bends)
    refits = _refits(points, seeds, terms, bends, coefficients, resamples, seed)
    fitted = [name for name in ("a", "b", "c", "d", "e_start", "e_max") if name not in held]
    intervals = {name: _interval(name, coefficients, refits, len(seeds)) for name in fitted}
    return Fit(coefficients, intervals, held, sizes, experts, seeds, refits)


def _refits(
    points: Sequence[Point],
    seeds: Sequence[int],
    terms: Sequence[str],
    bends: bool,
    start: Coefficients,
    resamples: int,
    seed: int,
) -> "tuple[Coefficients | None, ...]":
    """Return fits to seeds drawn with replacement. With few seeds most draws occur often; each is fitted once."""
    if len(seeds) < 2:
        return ()
    draws = np.sort(np.random.default_rng(seed).integers(0, len(seeds), (resamples, len(seeds))), axis=1)
    by_seed = [[point for point in points if point.seed == one] for one in seeds]
    known: dict[tuple[int, ...], Coefficients | None] = {}
    for draw in set(map(tuple, draws.tolist())):
        drawn = [point for number in draw for point in by_seed[number]]
        enough = np.linalg.matrix_rank(design(drawn, terms, Coefficients(0, 0, 0, 0))) == len(terms)
        if bends:
            cells = {(point.dense_parameters, point.experts) for point in drawn}
            enough &= len(cells) == len({(point.dense_parameters, point.experts) for point in points})
        known[draw] = least_squares_fit(drawn, terms, bends, start) if enough else None
    return tuple(known[draw] for draw in map(tuple, draws.tolist()))


def _interval(name: str, found: Coefficients, refits: "Sequence[Coefficients | None]", seeds: int) -> Interval:
    inverse = name in ("e_start", "e_max")

    def scaled(coefficients: Coefficients) -> float:
        value = getattr(coefficients, name)
        return 1 / value if inverse else value

    values = [scaled(refit) for refit in refits if refit is not None]
    if len(values) < 2:
        return Interval(getattr(found, name), math.nan, math.nan, seeds)
    error = float(np.std(values)) * math.sqrt(seeds / (seeds - 1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)) * error
    low, high = scaled(found) - half, scaled(found) + half
    if inverse:  # from 1 to infinity
        low, high = (1 / min(end, 1) if end > 0 else math.inf for end in (high, low))
    return Interval(getattr(found, name), low, high, seeds)


def _most_experts_at_one_size(points: Sequence[Point]) -> int:
    cells = {(point.dense_parameters, point.experts) for point in points}
    return max(Counter(size for size, _ in cells).values(), default=0)


def _check_points(points: Sequence[Point]) -> None:
    seen = set()
    for point in points:
        if not (math.isfinite(point.nats) and point.nats > 0 and point.experts >= 1 and point.dense_parameters > 1):
            raise UserError(f"{point} is no run; give nats above 0, 1 or more experts, and dense parameters above 1")
        if (key := (point.dense_parameters, point.experts, point.seed)) in seen:
            raise UserError(f"N = {key[0]:,}, E = {key[1]} and seed {key[2]} are given twice; give each run once")
        seen.add(key)
    if (different := _most_experts_at_one_size(points)) < 2:
        raise UserError(f"the points have {different} different E at one N; a fit takes 2 or more")


def _check_range(one: Fit, other: Fit, size: int, most: float, least: float) -> None:
    if not 1 <= least < most < math.inf:
        raise UserError(f"E from {least:g} to {most:g} is no range; give one that begins at 1 or more and has an end")
    for router in (one, other):
        if "a" in router.held and size not in router.sizes:
            raise UserError(f"N is {size:,}, but a fit has only points of N = {router.sizes[0]:,}; ask for that N")
