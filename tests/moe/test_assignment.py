"""The balanced-assignment solver against SciPy: optimal value, balanced loads, on random and on hard scores."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from fairseq_hash.moe import balanced_assignment as solver
from fairseq_hash.moe.balanced_assignment import Flow, balanced_assignment, equilibrium_prices


def best_value(score_TE):
    """The largest total score of a balanced assignment, by SciPy.

    Every expert has ceil(T / E) seats. The seats that T tokens leave empty are taken by fillers at no cost, which may
    sit on the last seat of an expert only: none has two of them.
    """
    score_TE = score_TE.double().numpy()
    tokens, experts = score_TE.shape
    seats = math.ceil(tokens / experts)
    fillers = np.full((experts * seats - tokens, experts * seats), np.inf)
    fillers[:, seats - 1 :: max(seats, 1)] = 0
    cost = np.concatenate([-np.repeat(score_TE, seats, axis=1), fillers])
    rows, columns = linear_sum_assignment(cost)
    return -cost[rows, columns].sum()


def check(score_TE, tolerance=1e-9):
    """Loads at most one apart, and SciPy's value up to float64's rounding over T sums."""
    tokens, experts = score_TE.shape
    expert_T = balanced_assignment(score_TE)
    assert expert_T.dtype == torch.int64 and expert_T.shape == (tokens,)
    load_E = torch.bincount(expert_T, minlength=experts)
    assert len(load_E) == experts and load_E.max() - load_E.min() <= 1
    value = score_TE.double().gather(1, expert_T.unsqueeze(1)).sum().item()
    best = best_value(score_TE)
    scale = score_TE.double().abs().sum().item()
    assert abs(value - best) <= tolerance * max(scale, 1e-300)


def normal(tokens, experts, seed=0):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


def cases(tokens, experts):
    """Scores by name: random ones, and those that break solvers."""
    noise, other = normal(tokens, experts), normal(tokens, experts, 1)
    generator = torch.Generator().manual_seed(2)
    yield "normal", noise
    yield "of a router", normal(tokens, 32) @ normal(32, experts, 1)
    yield "experts of unequal appeal", noise + 3 * other[:1]
    yield "one expert preferred by all", noise + 100 * torch.eye(experts)[0]
    yield "all tokens of one order", noise[:, :1].abs() @ other[:1]
    yield "heavy tails", noise / other
    yield "very heavy tails", (5 * noise.double()).exp()
    yield "tokens of unequal scale", noise * (3 * other[:, :1]).exp()
    yield "many ties", torch.randint(0, 3, (tokens, experts), generator=generator).float()
    yield "half precision", noise.bfloat16()
    yield "constant", torch.full((tokens, experts), 2.5)
    yield "the same token", noise[:1].expand(tokens, -1)
    yield "few kinds of token", noise[torch.randint(0, min(5, tokens), (tokens,), generator=generator)]
    yield "negative", -noise.abs() - 5
    yield "tiny differences", 1 + 1e-6 * noise
    yield "huge", 3e37 * noise
    yield "small", 1e-40 * noise
    yield "one-hot", torch.eye(experts)[torch.randint(0, experts, (tokens,), generator=generator)]


@pytest.mark.parametrize("tokens, experts", [(256, 16), (250, 16), (255, 8), (257, 8), (96, 48), (33, 32), (20, 32)])
def test_optimal_and_balanced_on_random_and_on_hard_scores(tokens, experts):
    for name, score_TE in cases(tokens, experts):
        try:
            check(score_TE)
        except AssertionError as error:
            raise AssertionError(f"scores: {name}") from error


@given(st.integers(0, 40), st.integers(1, 12), st.sampled_from([1, 3, 1000]), st.integers(0, 10_000))
def test_optimal_and_balanced_for_any_shape(tokens, experts, levels, seed):
    """Few levels mean many ties."""
    generator = torch.Generator().manual_seed(seed)
    check(torch.randint(0, levels, (tokens, experts), generator=generator).double())


@pytest.mark.parametrize("tokens, experts", [(2048, 16), (2048, 64)])
def test_optimal_at_training_sizes(tokens, experts):
    check(normal(tokens, experts))
    check(normal(tokens, experts).div(normal(tokens, experts, 1)))


@pytest.mark.parametrize("tokens, experts", [(256, 16), (250, 16), (20, 32)])
def test_optimal_whatever_the_prices(tokens, experts, monkeypatch):
    """The first step only saves time: random and absurd prices lead to the same value."""
    for scale in (0.0, 1.0, 100.0):
        monkeypatch.setattr(
            solver, "equilibrium_prices", lambda score, s=scale: s * normal(1, score.shape[1])[0].double()
        )
        check(normal(tokens, experts))


def test_prices_leave_little_to_do():
    """At these prices hardly a token is too many: without them a quarter of the tokens would be."""
    score_TE = (normal(4096, 64) + 2 * normal(1, 64, 1)).double()
    excess = []
    for price_E in (torch.zeros(64).double(), equilibrium_prices(score_TE)):
        load_E = torch.bincount((score_TE - price_E).argmax(dim=1), minlength=64)
        excess.append((load_E - 64).clamp(min=0).sum().item())
    assert excess[0] > 1024 and excess[1] <= 32


def test_always_the_best_for_its_loads():
    """Before it is balanced a flow is the best assignment with the loads it has: no cheaper chain is ever missed."""
    score_TE = normal(60, 5).double().numpy()
    flow = Flow(score_TE, np.array([0.3, 0.0, -0.2, 0.9, 0.0]))
    seats = np.repeat(np.arange(5), flow.load_E)
    rows, columns = linear_sum_assignment(score_TE[:, seats], maximize=True)
    expected = score_TE[:, seats][rows, columns].sum()
    assert math.isclose(score_TE[np.arange(60), flow.expert_T].sum(), expected, rel_tol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_refused(value):
    score_TE = normal(10, 4)
    score_TE[3, 2] = value
    with pytest.raises(ValueError, match="NaN" if math.isnan(value) else "infinite"):
        balanced_assignment(score_TE)


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(3, 0), torch.zeros(3, 2, dtype=torch.int64)])
def test_scores_of_another_form_are_refused(wrong):
    with pytest.raises(ValueError, match="give floating numbers"):
        balanced_assignment(wrong)


def test_scores_are_left_alone_and_results_repeat():
    score_TE = normal(500, 16)
    before = score_TE.clone()
    assert torch.equal(balanced_assignment(score_TE), balanced_assignment(score_TE.clone()))
    assert torch.equal(score_TE, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same_value():
    score_TE = normal(2048, 64)
    values = [
        score_TE.gather(1, balanced_assignment(score_TE.to(device)).cpu().unsqueeze(1)).double().sum()
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=0)
