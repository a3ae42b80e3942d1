"""BASE's balanced assignment of scores on a device: SciPy's optimum, and the loads at most one apart."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from fairseq_hash.moe.balanced_assignment import balanced_assignment

SHAPES = [(64, 4), (200, 8), (512, 16), (1000, 7)]


def normal(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def best_value(score_TE):
    """The largest total score of a balanced assignment, by SciPy, of scores in float64.

    Every expert has ceil(T / E) seats. Those that T tokens leave empty are taken by fillers at no cost, which sit on
    the last seat of an expert only.
    """
    tokens, experts = score_TE.shape
    seats = math.ceil(tokens / experts)
    fillers = np.full((experts * seats - tokens, experts * seats), np.inf)
    fillers[:, seats - 1 :: seats] = 0
    cost = np.concatenate([-np.repeat(score_TE.numpy(), seats, axis=1), fillers])
    rows, columns = linear_sum_assignment(cost)
    return -cost[rows, columns].sum()


SCORES = {
    "normal": normal,
    "of a router": lambda shape: normal((shape[0], 32)) @ normal((32, shape[1]), 1),
    "unequal appeal": lambda shape: normal(shape) + 3 * normal((1, shape[1]), 1),
    "one preferred by all": lambda shape: normal(shape) + 100 * torch.eye(shape[1])[0],
    "many ties": lambda shape: torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(2)).float(),
    "zeros": torch.zeros,
    "half zeros": lambda shape: normal(shape).relu(),
    "the same token": lambda shape: normal((1, shape[1])).expand(shape).contiguous(),
    "heavy tails": lambda shape: normal(shape) / normal(shape, 1),
    "huge": lambda shape: 3e37 * normal(shape),
    "bf16": lambda shape: normal(shape).bfloat16(),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scores", SCORES)
def test_optimal_and_balanced(scores, shape, device):
    score_TE = SCORES[scores](shape)
    expert_T = balanced_assignment(score_TE.to(device))
    assert expert_T.device.type == device.type and expert_T.dtype == torch.int64 and expert_T.shape == shape[:1]
    expert_T = expert_T.cpu()
    load_E = torch.bincount(expert_T, minlength=shape[1])
    assert len(load_E) == shape[1] and load_E.max() - load_E.min() <= 1
    exact_TE = score_TE.double()
    value = exact_TE.gather(1, expert_T.unsqueeze(1)).sum().item()
    assert abs(value - best_value(exact_TE)) <= 1e-9 * max(exact_TE.abs().sum().item(), 1e-300)


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (1, 5), (3, 8), (9, 1), (16384, 64)], ids=str)
def test_any_shape_and_repeats(shape, device):
    score_TE = normal(shape).to(device)
    first, second = balanced_assignment(score_TE), balanced_assignment(score_TE.clone())
    assert torch.equal(first, second)
    load_E = torch.bincount(first.cpu(), minlength=shape[1])
    assert load_E.max() - load_E.min() <= 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(value, device):
    score_TE = normal((10, 4)).to(device)
    score_TE[3, 2] = value
    with pytest.raises(ValueError, match="a score for the balanced assignment is (NaN|infinite)"):
        balanced_assignment(score_TE)
