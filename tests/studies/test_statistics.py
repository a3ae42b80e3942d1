"""Statistics of comparisons beside scipy, statsmodels, hand-made numbers and simulated studies."""

import gc
import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.weightstats import DescrStatsW, ttost_paired

from fairseq_hash.core.errors import UserError
from fairseq_hash.studies.statistics import Interval, Verdict, bootstrap_documents, compare_pairs, t_interval

SEEDS = range(1, 6)
STUDIES = 1000


def losses(**rows):
    """One loss per seed, from seed 1 up."""
    return {model: dict(enumerate(row, 1)) for model, row in rows.items()}


def holm(p_values):
    """By the definition: the smallest times the number of them, the next times one less, never going down."""
    order, adjusted, largest = np.argsort(p_values), np.zeros(len(p_values)), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


@pytest.fixture
def many(monkeypatch):
    """For thousands of comparisons: statsmodels collects garbage in each, which takes a hundred times what it does."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def studies(effects, noise, number=STUDIES, seed=0):
    """Simulated studies: the seed moves all models of a study by ten times what its noise does to each."""
    random = np.random.default_rng(seed)
    for _ in range(number):
        shared_S = random.normal(0, 10 * noise, len(SEEDS))
        yield {
            f"m{model}": dict(zip(SEEDS, 3 + effect + shared_S + random.normal(0, noise, len(SEEDS)), strict=True))
            for model, effect in enumerate(effects)
        }


def test_t_interval():
    """Beside statsmodels; one value has no ends."""
    for values in ([1.0, 2.0], [3.1, 3.4, 2.9, 3.05], list(np.random.default_rng(0).normal(size=30))):
        for confidence in (0.9, 0.95):
            found = t_interval(values, confidence)
            assert (found.low, found.high) == pytest.approx(DescrStatsW(values).tconfint_mean(1 - confidence))
            assert (found.mean, found.count) == (pytest.approx(sum(values) / len(values)), len(values))
    one = t_interval([2.5])
    assert (one.mean, one.count) == (2.5, 1) and math.isnan(one.low) and math.isnan(one.high)


def test_p_values_are_those_of_scipy_and_statsmodels():
    """Each pair with the seeds that both have, in any order; Holm by its definition over the pairs that are tested."""
    random = np.random.default_rng(3)
    table = pd.DataFrame(random.normal(3, 0.02, (8, 4)), columns=list("abcd"), index=range(8))
    table["b"] += 0.05
    nats = {model: table[model].to_dict() for model in table}
    del nats["c"][2], nats["d"][0], nats["d"][7]
    nats["c"] = dict(reversed(nats["c"].items()))
    nats["single"] = {4: 3.0}
    pairs = [*combinations("abcd", 2), ("a", "single")]
    found = compare_pairs(nats, pairs, margin=0.02)
    differences, equivalences = [], []
    for one, other in pairs[:-1]:
        seeds = sorted(nats[one].keys() & nats[other].keys())
        first, second = table.loc[seeds, one], table.loc[seeds, other]
        differences.append(stats.ttest_rel(second, first).pvalue)
        equivalences.append(ttost_paired(second.values, first.values, -math.log(1.02), math.log(1.02))[0])
        verdict = found[len(differences) - 1]
        ends = stats.ttest_rel(second, first).confidence_interval(0.95)
        assert (verdict.nats.low, verdict.nats.high) == pytest.approx(tuple(ends), rel=1e-9)
        assert verdict.ratio.mean == pytest.approx(stats.gmean(np.exp(second) / np.exp(first)), rel=1e-9)
        assert (verdict.ratio.low, verdict.ratio.high) == pytest.approx(np.exp(ends), rel=1e-9)
        assert (verdict.one, verdict.other, verdict.nats.count) == (one, other, len(seeds))
    assert [verdict.p_difference for verdict in found[:-1]] == pytest.approx(holm(differences), rel=1e-9)
    assert [verdict.p_equivalence for verdict in found[:-1]] == pytest.approx(holm(equivalences), rel=1e-9)
    assert (found[-1].word, found[-1].nats.count) == ("undecided", 1) and math.isnan(found[-1].p_difference)


def test_verdicts_and_their_order():
    """A difference that is surely smaller than the margin is none, even if it is surely not 0."""
    dense = [3.0, 3.1, 2.9, 3.05, 2.95]
    slightly = [value - 0.002 + 1e-4 * place for place, value in enumerate(dense)]
    much = [value - 0.042 + 1e-3 * place for place, value in enumerate(dense)]
    scattered = [value + 0.1 * (-1) ** place for place, value in enumerate(dense)]
    nats = losses(dense=dense, slightly=slightly, much=much, scattered=scattered)
    for pair in (("dense", "slightly"), ("slightly", "dense")):
        (verdict,) = compare_pairs(nats, [pair], 0.01)
        assert (verdict.word, verdict.better) == ("equivalent", None) and verdict.p_difference < 0.001
    (verdict,) = compare_pairs(nats, [("dense", "slightly")], 0.0001)
    assert (verdict.word, verdict.better) == ("better", "slightly")
    for pair in (("dense", "much"), ("much", "dense")):
        (verdict,) = compare_pairs(nats, [pair], 0.01)
        assert (verdict.word, verdict.better) == ("better", "much")
    (verdict,) = compare_pairs(nats, [("dense", "scattered")], 0.01)
    assert (verdict.word, verdict.better) == ("undecided", None)


def test_many_pairs_need_more_evidence():
    """A p-value of 0.02 decides a pair that is alone, and not one among six."""
    random = np.random.default_rng(0)
    pair = stats.zscore([0.1, 0.9, 0.4, 0.3], ddof=1)
    pair = (pair + stats.t.isf(0.01, 3) / 2) / 50  # the mean in standard errors gives p = 0.02
    nats = {"one": dict.fromkeys(SEEDS, 3.0), "other": dict(enumerate(3 + pair, 1))}
    nats |= {f"m{number}": dict(enumerate(random.normal(3, 1, 5), 1)) for number in range(4)}
    (alone,) = compare_pairs(nats, [("one", "other")], 0.001)
    assert (alone.word, alone.better) == ("better", "one") and alone.p_difference == pytest.approx(0.02)
    among = compare_pairs(nats, [("one", "other"), *((f"m{number}", "one") for number in range(4))], 0.001)[0]
    assert among.word == "undecided" and among.p_difference == pytest.approx(0.1)
    assert among.nats == alone.nats  # intervals are not adjusted


def test_pairs_that_are_still_to_come_count():
    """As if they were tested now, and the least significant."""
    nats = losses(a=[3.0, 3.1, 3.2], b=[3.11, 3.19, 3.31])
    (alone,) = compare_pairs(nats, [("a", "b")], 0.01)
    (planned,) = compare_pairs(nats, [("a", "b")], 0.01, planned=4)
    assert 0 < alone.p_difference < 0.05 and planned.p_difference == pytest.approx(4 * alone.p_difference)
    assert compare_pairs(nats, [("a", "b")], 0.01, planned=1) == [alone]


def test_differences_without_spread():
    """Identical runs are equivalent; a constant difference is decided by its size."""
    same = [3.0, 3.5, 2.5]
    nats = losses(a=same, b=same, c=[value + 0.5 for value in same], d=[value + 2**-9 for value in same])
    pairs = [("a", "b"), ("a", "c"), ("c", "b"), ("a", "d")]
    found = compare_pairs(nats, pairs, 0.01)
    words = [(verdict.word, verdict.better) for verdict in found]
    assert words == [("equivalent", None), ("better", "a"), ("better", "b"), ("equivalent", None)]
    assert (found[0].p_difference, found[0].p_equivalence, found[1].p_difference) == (1, 0, 0)
    assert not any("nan" in verdict.words() for verdict in found)


def test_fewer_than_two_shared_seeds():
    """Undecided, and not counted among the pairs for which p-values are adjusted."""
    nats = {**losses(a=[3.0, 3.1, 3.0], b=[3.2, 3.31, 3.19]), "late": {3: 3.0, 4: 3.1}, "none": {}}
    alone = compare_pairs(nats, [("a", "b")], 0.01)[0]
    pairs = [("late", "a"), ("a", "b"), ("none", "a")]
    late, among, none = compare_pairs(nats, pairs, 0.01)
    assert among == alone and (late.word, none.word) == ("undecided", "undecided")
    assert late.nats.mean == 0 and all(map(math.isnan, (late.nats.low, late.p_difference, late.p_equivalence)))
    assert math.isnan(none.nats.mean) and none.nats.count == 0
    assert late.words() == "late and a are undecided: they share one seed, and a comparison takes 2 or more"
    assert none.words() == "none and a are undecided: they share no seed, and a comparison takes 2 or more"
    assert compare_pairs(nats, [("none", "a")], 0.01)[0].word == "undecided"
    assert compare_pairs(nats, [], 0.01) == []


def test_words():
    interval = Interval(math.log(0.959), math.log(0.950), math.log(0.968), 5)
    common = {"margin": 0.01, "confidence": 0.95}
    verdict = Verdict("dense", "Hash", "better", "Hash", interval, 0.0021, 0.9, **common)
    better = "Hash is better than dense: 4.1 % lower perplexity (95 % interval 3.2 to 5.0, 5 seeds, p 0.002)"
    assert verdict.words() == better
    turned = Interval(-interval.mean, -interval.high, -interval.low, 5)
    assert Verdict("Hash", "dense", "better", "Hash", turned, 0.0021, 0.9, **common).words() == better
    small = Interval(-0.0001, -0.003, 0.0031, 4)
    assert Verdict("a", "b", "equivalent", None, small, 0.9, 0.0004, **common).words() == (
        "a and b are equivalent within 1 %: the perplexity of b differs by +0.0 % "
        "(95 % interval -0.3 to +0.3, 4 seeds, p below 0.001)"
    )
    wide = Interval(0.02, -0.01, 0.05, 4)
    assert Verdict("a", "b", "undecided", None, wide, 0.12, 0.7, **common).words() == (
        "a and b are undecided: the perplexity of b differs by +2.0 % "
        "(95 % interval -1.0 to +5.1, 4 seeds, p 0.120 for a difference, p 0.700 for equivalence within 1 %)"
    )


def test_equal_models_are_seldom_called_different(many):
    """Of studies of 6 equal models (15 pairs), at most 5 % (+ 3 standard errors) call any better."""
    pairs = list(combinations([f"m{model}" for model in range(6)], 2))
    false = sum(
        any(verdict.word == "better" for verdict in compare_pairs(nats, pairs, 1e-6)) for nats in studies([0] * 6, 0.01)
    )
    assert false / STUDIES <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / STUDIES)


@pytest.mark.parametrize("models", [2, 6])
def test_models_as_far_apart_as_the_margin_are_seldom_called_equal(models, many):
    """At most 5 % of studies call any equivalent; of one pair with little noise, nearly 5 % do."""
    margin = 0.02
    pairs = [("m0", f"m{model}") for model in range(1, models)]
    for sign in (1, -1):
        effects = [0, *[sign * math.log(1 + margin)] * (models - 1)]
        called = [compare_pairs(nats, pairs, margin) for nats in studies(effects, 0.002)]
        false = sum(any(verdict.word == "equivalent" for verdict in verdicts) for verdicts in called) / STUDIES
        error = math.sqrt(0.05 * 0.95 / STUDIES)
        assert false <= 0.05 + 3 * error and (models > 2 or false >= 0.05 - 3 * error)


def test_what_five_seeds_can_tell(many):
    """Pairs of equal seeds: the seed's own effect, ten times the noise, does not hide a difference."""
    pairs = list(combinations([f"m{model}" for model in range(3)], 2))
    called = [compare_pairs(nats, pairs, 0.01) for nats in studies([0, 0.03, 0.03], 0.001, 200)]
    words = [[(verdict.word, verdict.better) for verdict in verdicts] for verdicts in called]
    assert words.count([("better", "m0"), ("better", "m0"), ("equivalent", None)]) >= 190


def test_bootstrap_of_documents():
    """The mean beside a sum by hand, the ends beside the delta method's (within 5 % of the width).

    The difference is large, so that nats drawn apart from their tokens would show.
    """
    random = np.random.default_rng(0)
    token_D = random.integers(20, 400, 300)
    one_SD = token_D * random.normal(3.0, 0.2, (3, 300))
    other_SD = one_SD[:2] + token_D * random.normal(0.5, 0.1, (2, 300))
    found = bootstrap_documents(one_SD, other_SD, token_D)
    difference_D = other_SD.mean(axis=0) - one_SD.mean(axis=0)
    mean = sum(difference_D.tolist()) / sum(token_D.tolist())
    assert found.mean == pytest.approx(mean, rel=1e-12) and found.count == 300
    half = 1.96 * np.std(difference_D - mean * token_D) / token_D.mean() / math.sqrt(300)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)
    assert found == bootstrap_documents(one_SD, other_SD, token_D)
    assert found != bootstrap_documents(one_SD, other_SD, token_D, seed=1)
    same = bootstrap_documents(one_SD, one_SD, token_D)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_bootstrap_of_documents_covers():
    """Of 200 texts of 60 documents of very different lengths, 95 % (± 3 standard errors, - 2 % as promised) hold it."""
    random, covered = np.random.default_rng(1), 0
    for _ in range(200):
        token_D = np.ceil(random.lognormal(4, 0.8, 60))
        one_SD = token_D * random.normal(3, 0.3, (1, 60))
        other_SD = one_SD + token_D * random.normal(0.05, 0.1, (1, 60))
        found = bootstrap_documents(one_SD, other_SD, token_D, resamples=400)
        covered += found.low <= 0.05 <= found.high
    assert 0.93 - 3 * 0.0155 <= covered / 200 <= 0.95 + 3 * 0.0155


def test_bad_input_gets_one_line():
    nats = losses(a=[3.0, 3.1], b=[3.0, math.nan], c=[3.1, 3.2])
    for arguments, line in (
        (([("a", "c")], 0), "the margin is 0; give a relative difference of perplexity above 0, such as 0.01"),
        (([("a", "c")], 0.01, 0, 95), "the confidence is 95; give a number between 0 and 1, such as 0.95"),
        (([("a", "x")], 0.01), "a pair names x, which has no losses; there are a, b, c"),
        (([("a", "b")], 0.01), "the loss of b with seed 2 is nan; leave out a run that diverged"),
        (([("a", "a")], 0.01), "the pair a and a is of one model or given twice; give each pair once"),
        (([("a", "c"), ("c", "a")], 0.01), "the pair c and a is of one model or given twice; give each pair once"),
    ):
        with pytest.raises(UserError) as caught:
            compare_pairs(nats, *arguments)
        assert str(caught.value) == line
    for values in ([], [1.0, math.inf]):
        with pytest.raises(UserError, match="give one or more finite values"):
            t_interval(values)
    sums_SD, token_D = np.ones((2, 3)), np.ones(3)
    for arguments, line in (
        ((sums_SD, np.ones((2, 4)), token_D), r"nats have the shapes \[2, 3\] and \[2, 4\], tokens \[3\]; give"),
        ((sums_SD[0], sums_SD, token_D), r"nats have the shapes \[3\] and \[2, 3\], tokens \[3\]; give"),
        ((sums_SD[:, :1], sums_SD[:, :1], token_D[:1]), "1 documents and 4000 resamples given; give 2 and 100 or more"),
        ((sums_SD, sums_SD * math.nan, token_D), "not finite; leave out models that diverged"),
        ((sums_SD, sums_SD, np.array([1, 0, 2])), "document 1 has 0 tokens; leave out those without any"),
    ):
        with pytest.raises(UserError, match=line):
            bootstrap_documents(*arguments)
