"""The form of scaling beside published losses, a naive formula, scipy's regression, and simulated runs."""

import math

import numpy as np
import pytest
from scipy import stats

from fairseq_hash.core.errors import UserError
from fairseq_hash.studies.scaling_form import PUBLISHED, Point, crossing, crossing_words, fit, plain_power_law

N = 109_000_000
EXPERTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
NAMES = ("HASH", "S-BASE")


def naive(a, b, c, d, start, most, size, experts):
    """The loss, written anew from the paper with natural logarithms of 10 as the base."""
    alpha = 1 / (1 / start - 1 / most)
    effective = (1 / (experts - 1 + alpha) + 1 / most) ** -1
    n, e = math.log(size) / math.log(10), math.log(effective) / math.log(10)
    return math.exp((a * n + b * e + c * n * e + d) * math.log(10))


def of_form(values, sizes=(N,), experts=EXPERTS, seeds=(1,), noise=0.0, own=0.0, random=None):
    """Runs with the naive loss. A seed multiplies the losses of all its runs by one factor, and each by its own."""
    random = random or np.random.default_rng(0)
    shared = {seed: random.normal(0, noise) if noise else 0.0 for seed in seeds}
    return [
        Point(size, e, naive(*values, size, e) * math.exp(shared[seed] + (random.normal(0, own) if own else 0)), seed)
        for size in sizes
        for e in experts
        for seed in seeds
    ]


def values_of(name):
    held = PUBLISHED[name]
    return held.a, held.b, held.c, held.d, held.e_start, held.e_max


POWER = (0, -0.03, 0, 0.45, 1, math.inf)  # L = 2.818 E^-0.03


@pytest.mark.parametrize(
    ("name", "losses"),
    [
        ("HASH", {16: 2.557, 64: 2.442, 128: 2.389, 512: 2.307}),
        ("S-BASE", {16: 2.523, 64: 2.417}),
        ("RL-R", {16: 2.559, 64: 2.466, 128: 2.425, 512: 2.362}),
    ],
)
def test_published_losses(name, losses):
    """Within 0.002, at N = 109 million; this is what says that logarithms are to base 10."""
    for experts, nats in losses.items():
        assert PUBLISHED[name].nats(N, experts) == pytest.approx(nats, abs=0.002)


def test_effective_experts():
    for found in PUBLISHED.values():
        assert found.effective_experts(1) == pytest.approx(found.e_start, rel=1e-12)
        assert found.effective_experts(1e12) == pytest.approx(found.e_max, rel=1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_coefficients_are_found_again(name):
    """From runs without noise at three N: each within 0.1 %."""
    found = fit(of_form(values_of(name), (15_000_000, N, 1_300_000_000)))
    for key, value in zip(("a", "b", "c", "d", "e_start", "e_max"), values_of(name), strict=True):
        assert getattr(found.coefficients, key) == pytest.approx(value, rel=1e-3), key
    assert not found.held and found.words() == "fitted: a, b, c, d, e_start, e_max"
    assert math.isnan(found.intervals["b"].low) and found.refits == ()


def test_one_size():
    """The slope and level of this N; a and c have no effect of their own."""
    a, b, c, d, start, most = values_of("HASH")
    found = fit(of_form(values_of("HASH")))
    size = math.log10(N)
    for key, value in {"b": b + c * size, "d": d + a * size, "e_start": start, "e_max": most, "a": 0, "c": 0}.items():
        assert getattr(found.coefficients, key) == pytest.approx(value, rel=1e-3), key
    assert list(found.intervals) == ["b", "d", "e_start", "e_max"]
    assert found.words() == (
        "fitted: b, d, e_start, e_max; held: a at 0 (the points have one N); c at 0 (the points have one N)"
    )


def test_few_experts():
    """Fewer than 5 different E: a plain power law, as scipy's regression has it, also on noise."""
    points = of_form(values_of("S-BASE"), experts=(2, 8, 32, 128), seeds=(1, 2, 3), own=0.01)
    line = stats.linregress(np.log10([point.experts for point in points]), np.log10([point.nats for point in points]))
    found, plain = fit(points), plain_power_law(points)
    assert (found.coefficients.b, found.coefficients.d) == pytest.approx((line.slope, line.intercept), rel=1e-9)
    for name, value in (("b", line.slope), ("d", line.intercept)):
        interval = plain.intervals[name]
        assert interval.mean == pytest.approx(value, rel=1e-9) and interval.low < interval.mean < interval.high
    assert found.held["e_start"] == "4 different E at one N, 5 are needed"
    assert "e_start at 1 (4 different E at one N, 5 are needed); e_max at inf" in found.words()
    assert "e_max" in fit(of_form(values_of("HASH"), experts=EXPERTS[:5])).intervals
    assert "e_max" in plain_power_law(of_form(values_of("HASH"))).held


def test_sizes_that_do_not_tell_c():
    """Only one N has several E: a is fitted, c held."""
    points = of_form(POWER, experts=(1, 4, 16)) + of_form(POWER, (2 * N,), experts=(4,))
    found = fit(points)
    assert list(found.intervals) == ["a", "b", "d"] and found.held["c"] == "no two N have 2 different E each"
    assert (found.coefficients.a, found.coefficients.b) == pytest.approx((0, -0.03), abs=1e-9)


def test_interval_is_that_of_one_fit_per_seed():
    """With the same E for each seed, b is the mean of one regression per seed: its t interval, ends within 5 %."""
    seeds = (3, 5, 8, 9)
    points = of_form(POWER, experts=(1, 4, 16, 64), seeds=seeds, noise=0.02, own=0.01)
    slopes = [plain_power_law([point for point in points if point.seed == seed]).coefficients.b for seed in seeds]
    low, high = stats.t.interval(0.95, 3, np.mean(slopes), stats.sem(slopes))
    found = plain_power_law(points, resamples=4000).intervals["b"]
    assert found.mean == pytest.approx(np.mean(slopes), rel=1e-9) and found.count == 4
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05 * (high - low) / 2)


def test_intervals_cover():
    """Of 200 simulated sets of 4 seeds, 95 % (± 3 standard errors) hold the exponent, and d."""
    random, covered = np.random.default_rng(5), np.zeros(2)
    for _ in range(200):
        points = of_form(POWER, experts=(1, 8, 64), seeds=range(4), noise=0.01, own=0.01, random=random)
        found = plain_power_law(points, resamples=300)
        for place, (name, true) in enumerate((("b", -0.03), ("d", 0.45))):
            covered[place] += found.intervals[name].low <= true <= found.intervals[name].high
    error = math.sqrt(0.05 * 0.95 / 200)
    assert (covered / 200 >= 0.95 - 3 * error).all() and (covered / 200 <= 0.95 + 3 * error).all()


def test_intervals_of_the_shape():
    """They hold what made the runs, in 1 to infinity; refits are the same with the same seed."""
    points = of_form(values_of("HASH"), seeds=range(3), noise=0.005, own=0.001)
    found = fit(points, resamples=60)
    for key, value in (("e_start", 4.175), ("e_max", 477.741)):
        assert 1 <= found.intervals[key].low < value < found.intervals[key].high
    assert found.refits == fit(points, resamples=60).refits != fit(points, resamples=60, seed=1).refits


def test_resamples_that_do_not_tell():
    """If only one seed has a second E, draws without this seed are left out."""
    points = [*of_form(POWER, experts=(1,), seeds=(1, 2, 3)), *of_form(POWER, experts=(8,), seeds=(1,))]
    found = plain_power_law(points)
    missing = sum(refit is None for refit in found.refits) / len(found.refits)
    assert missing == pytest.approx((2 / 3) ** 3, abs=0.05)
    assert all(refit is None or refit.b == pytest.approx(-0.03) for refit in found.refits)


def test_crossing_of_power_laws():
    """2.8 E^-0.02 and 3.0 E^-0.03 are equal at E = (3 / 2.8)^100 = 991.7."""
    one = fit(of_form((0, -0.02, 0, math.log10(2.8), 1, math.inf), experts=(1, 4, 16)))
    other = fit(of_form((0, -0.03, 0, math.log10(3.0), 1, math.inf), experts=(1, 4, 16)))
    for pair in ((one, other), (other, one)):
        assert crossing(*pair, N, 2000) == pytest.approx((3 / 2.8) ** 100, rel=1e-6)
        assert crossing(*pair, N, 900) is None and crossing(*pair, N, 2000, 1000) is None
    assert crossing(one, one, N, 2000) is None
    assert crossing_words(("A", "B"), one, other, N, 2000) == (
        "A and B cross at E = 992: A is better below, B above (beyond the E that were run, up to 16); "
        "one seed, so how sure this is cannot be told"
    )
    assert crossing_words(("A", "B"), one, other, N, 900).startswith(
        "A and B do not cross from E = 2 to 900 (run: up to 16): A has the lower loss; one seed"
    )


def test_crossing_of_published_routers():
    """Their losses at 512 experts are 2.307 and 2.308; below, S-BASE is better, but not from 1 to 2 experts."""
    one, other = (fit(of_form(values_of(name))) for name in NAMES)
    place = crossing(one, other, N, 1024)
    assert 256 < place < 512
    assert naive(*values_of("HASH"), N, place) == pytest.approx(naive(*values_of("S-BASE"), N, place), rel=1e-5)
    early = crossing(one, other, N, 1024, 1)
    assert 1 < early < 2
    assert naive(*values_of("HASH"), N, early) == pytest.approx(naive(*values_of("S-BASE"), N, early), rel=1e-5)
    assert crossing_words(NAMES, one, other, N, 1024, 1).startswith(
        "HASH and S-BASE cross at E = 2: HASH is better below, S-BASE above "
        f"until they cross again at E = {place:.0f}; "
    )


def test_how_often_refits_cross():
    """What a seed does to both cancels; with own noise some refits cross elsewhere or not at all."""
    flat, steep = (0, -0.02, 0, math.log10(2.8), 1, math.inf), (0, -0.03, 0, math.log10(2.9), 1, math.inf)
    seeds, experts = (1, 2, 3, 4), (1, 4, 16)
    one, other = (
        fit(of_form(values, experts=experts, seeds=seeds, noise=0.5, random=np.random.default_rng(7)))
        for values in (flat, steep)
    )
    place = (2.9 / 2.8) ** 100
    assert crossing_words(("A", "B"), one, other, N, 100).endswith(
        f"100 % of 1,000 refits to resampled seeds cross in this range, 95 % of these at E = {place:.0f} to {place:.0f}"
    )
    apart = fit(of_form(steep, experts=experts, seeds=(5, 6, 7, 8), noise=0.5, random=np.random.default_rng(7)))
    share = crossing_words(("A", "B"), one, apart, N, 100).partition(" % of ")[0].split()[-1]
    assert int(share) < 60
    one, other = (
        fit(of_form(values, experts=experts, seeds=seeds, own=0.01, random=np.random.default_rng(number)))
        for number, values in enumerate((flat, steep))
    )
    text = crossing_words(("A", "B"), one, other, N, 100)
    count = sum(crossing_of(*pair) <= 100 for pair in zip(one.refits, other.refits, strict=True))
    assert f"{count / 10:.0f} % of 1,000 refits" in text and 0 < count < 1000


def crossing_of(one, other):
    """The E of two plain power laws, or infinity if it is below 2."""
    place = 10 ** ((other.d - one.d) / (one.b - other.b))
    return place if place >= 2 else math.inf


def test_bad_input_gets_one_line():
    good = of_form(POWER, experts=(1, 4))
    for points, line in (
        ([], "the points have 0 different E at one N; a fit takes 2 or more"),
        (good[:1], "the points have 1 different E at one N; a fit takes 2 or more"),
        ([good[0], Point(2 * N, 4, 3.0, 1)], "the points have 1 different E at one N; a fit takes 2 or more"),
        ([*good, good[1]], "N = 109,000,000, E = 4 and seed 1 are given twice; give each run once"),
        ([Point(N, 4, math.nan, 1)], "nats=nan, seed=1) is no run; give nats above 0, 1 or more experts"),
        ([Point(N, 0, 3.0, 1)], "experts=0, nats=3.0, seed=1) is no run; give nats above 0, 1 or more experts"),
    ):
        with pytest.raises(UserError) as caught:
            fit(points)
        assert line in str(caught.value)
    with pytest.raises(UserError, match="the points have 2 different N; give those of one N to a plain power law"):
        plain_power_law([*good, Point(2 * N, 4, 3.0, 1)])
    found = fit(good)
    with pytest.raises(UserError, match=r"N is 1,000, but a fit has only points of N = 109,000,000; ask for that N"):
        crossing(found, found, 1000, 64)
    for most, least in ((1, 1), (64, 64), (64, 0.5), (math.inf, 1), (math.nan, 1)):
        with pytest.raises(UserError, match="is no range; give one that begins at 1 or more and has an end"):
            crossing(found, found, N, most, least)
