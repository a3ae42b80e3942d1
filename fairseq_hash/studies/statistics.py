"""Statistics of comparisons: paired by seed, with an equivalence margin, corrected for the number of pairs.

Losses are mean negative log likelihoods per token in nats, so that a difference of nats is the logarithm of a ratio of
perplexities. Equivalence: D. J. Schuirmann, two one-sided tests, J. Pharmacokinet. Biopharm. 15 (1987), 657-680. Many
pairs: S. Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6 (1979), 65-70.

Shape suffixes: P pairs, S seeds, D documents.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap, ttest_1samp
from statsmodels.stats.multitest import multipletests

from fairseq_hash.core.errors import UserError

BETTER, EQUIVALENT, UNDECIDED = "better", "equivalent", "undecided"
RESAMPLES = 4000  # the ends of a 95 % interval then have a chance error of about a twentieth of its half width
VALUES_AT_ONCE = 1 << 22  # of a bootstrap, in memory


@dataclass(frozen=True)
class Interval:
    """A mean (or estimate) with the ends of its confidence interval, and of how many values; ends may be NaN."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Verdict:
    """What the seeds say about two models.

    The interval is that of this pair alone, not adjusted for the number of pairs, while both p-values are. So a pair
    may be undecided although its interval lies apart from 0, or within the margin.

    Attributes:
        word: `better`, `equivalent` or `undecided`.
        better: the better model if the word is `better`, else None.
        nats: nats per token of `other` minus those of `one`, over the seeds that both have; NaN if they share none.
        p_difference: of the paired t test of no difference, two-sided, Holm-adjusted; NaN with fewer than 2 seeds.
        p_equivalence: of the two one-sided paired t tests, Holm-adjusted; NaN with fewer than 2 seeds.
        margin: relative difference of perplexity, such as 0.01.
        confidence: of the interval; p-values are compared with 1 minus it.
    """

    one: str
    other: str
    word: str
    better: "str | None"
    nats: Interval
    p_difference: float
    p_equivalence: float
    margin: float
    confidence: float

    @property
    def ratio(self) -> Interval:
        """The perplexity of `other` divided by that of `one`: the geometric mean over the seeds."""
        nats = self.nats
        return Interval(math.exp(nats.mean), math.exp(nats.low), math.exp(nats.high), nats.count)

    def words(self) -> str:
        """Return the verdict as a sentence. Its interval is not adjusted for the number of pairs, its p-values are."""
        one, other, seeds = self.one, self.other, self.nats.count
        if seeds < 2:
            shared = "no seed" if seeds == 0 else "one seed"
            return f"{one} and {other} are undecided: they share {shared}, and a comparison takes 2 or more"
        confidence = f"{100 * self.confidence:g} % interval"
        nats = self.nats
        if self.word == BETTER:
            worse = other if self.better == one else one
            # Of the worse model minus the better one: how much lower the better one's perplexity is.
            gains = (nats.mean, nats.low, nats.high) if self.better == one else (-nats.mean, -nats.high, -nats.low)
            mean, low, high = (_shown(-_percent(-gain)) for gain in gains)
            facts = f"{confidence} {low} to {high}, {seeds} seeds, {_p(self.p_difference)}"
            return f"{self.better} is better than {worse}: {mean} % lower perplexity ({facts})"
        mean, low, high = (_shown(_percent(value), "+.1f") for value in (nats.mean, nats.low, nats.high))
        facts = f"{confidence} {low} to {high}, {seeds} seeds"
        within, measured = f"within {100 * self.margin:g} %", f"the perplexity of {other} differs by {mean} %"
        if self.word == EQUIVALENT:
            return f"{one} and {other} are equivalent {within}: {measured} ({facts}, {_p(self.p_equivalence)})"
        tests = f"{_p(self.p_difference)} for a difference, {_p(self.p_equivalence)} for equivalence {within}"
        return f"{one} and {other} are undecided: {measured} ({facts}, {tests})"


def t_interval(values: "Sequence[float] | np.ndarray", confidence: float = 0.95) -> Interval:
    """Return the mean of one or more values with its interval by Student's t; with one value the ends are NaN.

    Raises:
        UserError: for no values, values that are not finite, or a confidence that is not between 0 and 1.
    """
    _check_confidence(confidence)
    value_S = np.asarray(values, dtype=np.float64)
    if value_S.size == 0 or not np.isfinite(value_S).all():
        raise UserError(f"an interval of {value_S.tolist()} is not defined; give one or more finite values")
    mean, count = float(value_S.mean()), len(value_S)
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1)
    with _without_spread():
        ends = ttest_1samp(value_S, 0).confidence_interval(confidence)
    return Interval(mean, float(ends.low), float(ends.high), count)


def compare_pairs(
    nats: Mapping[str, Mapping[int, float]],
    pairs: Sequence[tuple[str, str]],
    margin: float,
    planned: int = 0,
    confidence: float = 0.95,
) -> list[Verdict]:
    """Return a verdict for each pair of models, (one, other), in the order of the pairs.

    What is tested are differences of nats, other minus one, of equal seeds. Two models are equivalent if their
    difference surely lies within ± log(1 + margin): the perplexity of neither is more than `margin` above the other's.
    This comes first: a difference that is surely smaller than the margin is called none even if it is surely not 0.
    Otherwise the one with the smaller loss is better if the difference is surely not 0. All else is undecided, as are
    models that share fewer than 2 seeds. Surely: with a p-value below 1 - confidence.

    The p-values are Holm-adjusted over the pairs that are tested, those of differences and those of equivalence as two
    families. So the chance of any false `better` among them is at most 1 - confidence, and that of any false
    `equivalent`, too. Intervals are not adjusted.

    Args:
        nats: `nats[model][seed]`, the mean negative log likelihood per token on one held-out text.
        margin: relative difference of perplexity: 0.01 for 1 %.
        planned: how many pairs will be tested together once all models have run, if those are more than can be tested
            now. The adjustment is for as many, so that a verdict does not come too early.

    Raises:
        UserError: for a model that `nats` lacks, a pair of one model or a pair given twice, a loss that is not finite,
            a margin that is not above 0, or a confidence that is not between 0 and 1.
    """
    _check_confidence(confidence)
    if not (math.isfinite(margin) and margin > 0):
        raise UserError(f"the margin is {margin}; give a relative difference of perplexity above 0, such as 0.01")
    _check_pairs(nats, pairs)
    differences = [_differences(nats[one], nats[other]) for one, other in pairs]
    count_P = np.array([len(difference_S) for difference_S in differences], dtype=int)
    mean_P = np.array([difference_S.mean() if len(difference_S) else math.nan for difference_S in differences])
    end_P2, p_P2 = np.full((2, len(pairs), 2), math.nan)
    tested = np.flatnonzero(count_P > 1)
    for count in set(count_P[tested].tolist()):  # SciPy tests many pairs in one call
        (same_Q,) = np.nonzero(count_P == count)
        difference_QS = np.array([differences[pair] for pair in same_Q])
        end_P2[same_Q], p_P2[same_Q] = _tests(difference_QS, math.log1p(margin), confidence)
    adjusted = np.full((len(pairs), 2), math.nan)
    if len(tested):
        untested = np.ones(max(0, planned - len(tested)))  # as if they were the least significant
        families = [np.append(family, untested) for family in p_P2[tested].T]
        adjusted[tested] = np.column_stack(
            [multipletests(family, method="holm")[1][: len(tested)] for family in families]
        )
    verdicts = []
    rows = zip(mean_P.tolist(), end_P2.tolist(), count_P.tolist(), adjusted.tolist(), strict=True)
    for (one, other), (mean, ends, count, (p_difference, p_equivalence)) in zip(pairs, rows, strict=True):
        interval = Interval(mean, *ends, count)
        word, better = UNDECIDED, None
        if p_equivalence < 1 - confidence:
            word = EQUIVALENT
        elif p_difference < 1 - confidence:
            word, better = BETTER, one if interval.mean > 0 else other
        verdicts.append(Verdict(one, other, word, better, interval, p_difference, p_equivalence, margin, confidence))
    return verdicts


def bootstrap_documents(
    nats_one_SD: np.ndarray,
    nats_other_SD: np.ndarray,
    token_D: np.ndarray,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Return the difference of mean nats per token, other minus one, with its interval over documents.

    The interval is the chance of the choice of documents, given these trained models: whole documents are drawn anew,
    each with its tokens and with both models' nats, and the ends are percentiles of the draws. What other seeds would
    have given is not in it (`compare_pairs`). Percentiles, not BCa, which is not defined for equal models; with fewer
    than about 30 documents they are too close together.

    Args:
        nats_one_SD: sums of nats over the tokens of each document, float `[seeds, documents]`. Seeds are averaged.
        nats_other_SD: those of the other model, of the same documents; its number of seeds may differ.
        token_D: tokens of each document, above 0.
        seed: of the draws.
        resamples: number of draws, 100 or more.

    Raises:
        UserError: if shapes do not fit together, there are fewer than 2 documents, values are not finite, documents
            have no tokens, or a confidence is not between 0 and 1.
    """
    _check_confidence(confidence)
    one_SD, other_SD, token_D = (np.asarray(values, dtype=float) for values in (nats_one_SD, nats_other_SD, token_D))
    documents = token_D.size
    for values_SD in (one_SD, other_SD):
        if values_SD.ndim != 2 or values_SD.shape[0] == 0 or values_SD.shape[1:] != token_D.shape:
            shapes = f"{list(one_SD.shape)} and {list(other_SD.shape)}, tokens {list(token_D.shape)}"
            raise UserError(f"nats have the shapes {shapes}; give [seeds, documents] twice, and [documents]")
    if documents < 2 or resamples < 100:
        raise UserError(f"{documents} documents and {resamples} resamples given; give 2 and 100 or more")
    if not (np.isfinite(one_SD).all() and np.isfinite(other_SD).all() and np.isfinite(token_D).all()):
        raise UserError("some nats or tokens of documents are not finite; leave out models that diverged")
    if token_D.min() <= 0:
        raise UserError(f"document {int(token_D.argmin())} has {token_D.min():g} tokens; leave out those without any")
    samples = (other_SD.mean(axis=0) - one_SD.mean(axis=0), token_D)
    found = bootstrap(
        samples,
        _ratio_of_sums,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, VALUES_AT_ONCE // documents),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(_ratio_of_sums(*samples)), float(found.low), float(found.high), documents)


def _ratio_of_sums(nats_D: np.ndarray, token_D: np.ndarray, axis: int = -1) -> np.ndarray:
    return nats_D.sum(axis=axis) / token_D.sum(axis=axis)


def _differences(one: Mapping[int, float], other: Mapping[int, float]) -> np.ndarray:
    """Return nats of `other` minus those of `one`, by the seeds that both have, [S]."""
    return np.array([other[seed] - one[seed] for seed in sorted(one.keys() & other.keys())])


def _tests(difference_PS: np.ndarray, bound: float, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the intervals of 2 or more seeds, `[P, 2]`, and their p-values, `[P, 2]`.

    These are of a difference and of equivalence within ± bound. Differences without spread (runs that are identical, or
    differ by a constant) are decided by their size.
    """
    with _without_spread():
        difference = ttest_1samp(difference_PS, 0, axis=1)
        ends = difference.confidence_interval(confidence)
        above_P = ttest_1samp(difference_PS, -bound, axis=1, alternative="greater").pvalue
        below_P = ttest_1samp(difference_PS, bound, axis=1, alternative="less").pvalue
    mean_P = difference_PS.mean(axis=1)
    of_tests_P2 = np.column_stack([difference.pvalue, np.maximum(above_P, below_P)])  # both one-sided tests must reject
    by_size_P2 = np.column_stack([mean_P == 0, np.abs(mean_P) >= bound])
    has_no_spread_P1 = np.ptp(difference_PS, axis=1, keepdims=True) == 0
    return np.column_stack([ends.low, ends.high]), np.where(has_no_spread_P1, by_size_P2, of_tests_P2)


@contextmanager
def _without_spread() -> Iterator[None]:
    """Let values without spread pass without a word from SciPy; their interval is a point."""
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def _check_pairs(nats: Mapping[str, Mapping[int, float]], pairs: Sequence[tuple[str, str]]) -> None:
    seen: set[frozenset[str]] = set()
    for pair in pairs:
        for model in pair:
            if model not in nats:
                raise UserError(f"a pair names {model}, which has no losses; there are {', '.join(nats) or 'none'}")
            for seed, value in nats[model].items():
                if not math.isfinite(value):
                    raise UserError(f"the loss of {model} with seed {seed} is {value}; leave out a run that diverged")
        if len(set(pair)) < 2 or set(pair) in seen:
            raise UserError(f"the pair {' and '.join(pair)} is of one model or given twice; give each pair once")
        seen.add(frozenset(pair))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise UserError(f"the confidence is {confidence}; give a number between 0 and 1, such as 0.95")


def _percent(nats: float) -> float:
    """Return how many percent a difference of nats adds to a perplexity."""
    return 100 * math.expm1(nats)


def _shown(percent: float, form: str = ".1f") -> str:
    return format(round(percent, 1) + 0.0, form)  # -0.0 + 0.0 is 0.0


def _p(value: float) -> str:
    return "p below 0.001" if value < 0.001 else f"p {value:.3f}"
