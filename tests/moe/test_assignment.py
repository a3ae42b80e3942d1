"""The balanced-assignment solver against SciPy: optimal value, balanced loads, on random and on hard scores."""

import math

import numpy as np
import pytest
import torch
from assignments import SCORES, check, normal
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from fairseq_hash.moe import balanced_assignment as solver
from fairseq_hash.moe.balanced_assignment import Flow, balanced_assignment, equilibrium_prices


@pytest.mark.parametrize("tokens, experts", [(256, 16), (250, 16), (255, 8), (257, 8), (96, 48), (33, 32), (20, 32)])
@pytest.mark.parametrize("scores", SCORES)
def test_optimal_and_balanced_on_random_and_on_hard_scores(scores, tokens, experts):
    check(SCORES[scores](tokens, experts))


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
        prices = scale * normal(1, experts)[0].double()
        monkeypatch.setattr(solver, "equilibrium_prices", lambda score, p=prices: p)
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
