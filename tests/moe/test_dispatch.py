"""Dispatch and combine: properties on random assignments, and hand-worked cases."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fairseq_hash.moe.dispatch_plan import expert_capacity, random_order
from fairseq_hash.moe.dispatchers import make_dispatcher
from fairseq_hash.moe.token_dispatcher import combine, dispatch
from fairseq_hash.parallel.groups import ExpertParallel


@st.composite
def assignments(draw):
    """An assignment [T, K] to E experts, T down to zero."""
    num_experts = draw(st.integers(1, 9))
    shape = draw(st.integers(0, 40)), draw(st.integers(1, 3))
    expert = draw(st.lists(st.integers(0, num_experts - 1), min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(expert, dtype=torch.int64).view(shape), num_experts


@given(assignments(), st.sampled_from([0.0, 0.3, 1.0, 1.25, 100.0]))
def test_plan_keeps_the_first_choices_of_each_expert(assignment, capacity_factor):
    expert_TK, num_experts = assignment
    plan = make_dispatcher(ExpertParallel(num_experts)).begin(expert_TK, capacity_factor).plan
    chosen = expert_TK.flatten().tolist()
    capacity = math.inf
    if capacity_factor:
        capacity = math.ceil(round(len(chosen) * capacity_factor / num_experts, 6))
    rows = [[] for _ in range(num_experts)]
    for place, expert in enumerate(chosen):
        if len(rows[expert]) < capacity:
            rows[expert].append(place)
    assert plan.choice_R.tolist() == [place for group in rows for place in group]
    assert list(plan.rows_per_expert) == [len(group) for group in rows]
    assert plan.tokens_per_expert_E.tolist() == [chosen.count(expert) for expert in range(num_experts)]
    assert plan.dropped == len(chosen) - sum(plan.rows_per_expert)


@given(assignments(), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99))
def test_random_drops_keep_the_first_choices_in_a_random_order(assignment, capacity_factor, seed):
    """The plan against a loop over the tokens in the order that the seed gives."""
    expert_TK, num_experts = assignment
    tokens, choices = expert_TK.shape
    torch.manual_seed(seed)
    plan = make_dispatcher(ExpertParallel(num_experts)).begin(expert_TK, capacity_factor, random_order(expert_TK)).plan
    torch.manual_seed(seed)
    order = [token * choices + k for token in torch.randperm(tokens).tolist() for k in range(choices)]
    chosen = expert_TK.flatten().tolist()
    kept = reference.kept_under_capacity(chosen, num_experts, capacity_factor, order)
    assert sorted(plan.choice_R.tolist()) == [choice for choice, is_kept in enumerate(kept) if is_kept]
    assert [chosen[choice] for choice in plan.choice_R.tolist()] == sorted(chosen[c] for c in plan.choice_R.tolist())
    assert plan.dropped == kept.count(False)
    assert plan.tokens_per_expert_E.tolist() == [chosen.count(expert) for expert in range(num_experts)]


@pytest.mark.parametrize("drops_randomly", [False, True])
def test_random_drops_meet_all_positions_alike(drops_randomly):
    """Drops by sixteenth of a batch, over 400 batches: flat if random (chi-square), rising from 0 if by position."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    dropped_16 = torch.zeros(16)
    for _ in range(400):
        # Expert 0 gets half of the tokens, twice its capacity.
        expert_TK = torch.randint(-3, 4, (256, 1), generator=generator).clamp(min=0)
        order_C = random_order(expert_TK) if drops_randomly else None
        plan = make_dispatcher(ExpertParallel(4)).begin(expert_TK, 1.0, order_C).plan
        dropped_T = torch.ones(256).index_fill(0, plan.choice_R, 0.0)
        dropped_16 += dropped_T.view(16, 16).sum(dim=1)
    flat = stats.chisquare(dropped_16.numpy()).pvalue
    if drops_randomly:
        assert flat > 0.01
    else:
        assert flat < 1e-9 and dropped_16[0] == 0


@given(assignments(), st.booleans(), st.sampled_from([0.0, 0.8]))
def test_combine_undoes_dispatch(assignment, weighted, capacity_factor):
    """With experts that multiply by their number, each token comes back as the sum of its experts' numbers."""
    expert_TK, num_experts = assignment
    tokens, choices = expert_TK.shape
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(tokens, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight_TK = torch.rand(tokens, choices, generator=generator, dtype=torch.float64) if weighted else None
    plan = make_dispatcher(ExpertParallel(num_experts)).begin(expert_TK, capacity_factor).plan
    number_R = torch.arange(1, num_experts + 1).repeat_interleave(torch.tensor(plan.rows_per_expert))
    y_TD = combine(dispatch(x_TD, plan) * number_R.unsqueeze(1), plan, weight_TK)

    kept_TK = torch.zeros(tokens * choices, dtype=torch.float64)
    kept_TK[plan.choice_R] = 1
    factor_TK = kept_TK.view(tokens, choices) * (expert_TK + 1)
    if weighted:
        factor_TK = factor_TK * weight_TK
    factor_T1 = factor_TK.sum(dim=1, keepdim=True)
    # Products and sums of at most three float64 numbers, in another order.
    torch.testing.assert_close(y_TD, x_TD * factor_T1, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(y_TD.sum(), x_TD, allow_unused=True)
    torch.testing.assert_close(gradient, factor_T1.expand(-1, 3), rtol=1e-12, atol=1e-12)


def test_worked_example():
    """Five tokens, three experts, capacity factor 0.6: one row an expert."""
    plan = make_dispatcher(ExpertParallel(3)).begin(torch.tensor([[2], [0], [2], [0], [2]]), 0.6).plan
    assert plan.choice_R.tolist() == [1, 0]
    assert plan.rows_per_expert == (1, 0, 1)
    assert plan.tokens_per_expert_E.tolist() == [2, 0, 3]
    assert plan.dropped == 3
    y = combine(torch.tensor([[10.0], [20.0]]), plan, None)
    assert y.flatten().tolist() == [20.0, 10.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "choices, experts, factor, capacity",
    [(10, 11, 1.1, 1), (100, 8, 1.25, 16), (7, 2, 1.0, 4), (1, 64, 1.0, 1), (0, 4, 1.0, 0), (5, 2, 0.0, None)],
)
def test_capacity_is_the_mean_load_times_the_factor_rounded_up(choices, experts, factor, capacity):
    assert expert_capacity(choices, experts, factor) == capacity


def test_dropping_never_looks_at_later_tokens():
    """Whether a token is kept is the same when the tokens after it change."""
    generator = torch.Generator().manual_seed(3)
    expert_TK = torch.randint(4, (40, 1), generator=generator)
    changed = expert_TK.clone()
    changed[25:] = torch.randint(4, (15, 1), generator=generator)
    plans = [make_dispatcher(ExpertParallel(4)).begin(e, 0.5).plan for e in (expert_TK, changed)]
    kept = [set(plan.choice_R.tolist()) & set(range(25)) for plan in plans]
    assert kept[0] == kept[1] and len(kept[0]) < 25
