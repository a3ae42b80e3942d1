"""Scores for BASE's balanced assignment, easy and hard ones, and a check of an assignment against SciPy's."""

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from fairseq_hash.moe.balanced_assignment import balanced_assignment


def best_value(score_TE):
    """Return the largest total score of a balanced assignment, by SciPy in float64.

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


def check(score_TE, device="cpu"):
    """Loads at most one apart, and SciPy's value up to float64's rounding over T sums."""
    tokens, experts = score_TE.shape
    expert_T = balanced_assignment(score_TE.to(device))
    assert expert_T.dtype == torch.int64 and expert_T.shape == (tokens,)
    assert expert_T.device.type == torch.device(device).type
    load_E = torch.bincount(expert_T.cpu(), minlength=experts)
    assert len(load_E) == experts and load_E.max() - load_E.min() <= 1
    value = score_TE.double().gather(1, expert_T.cpu().unsqueeze(1)).sum().item()
    scale = score_TE.double().abs().sum().item()
    assert abs(value - best_value(score_TE)) <= 1e-9 * max(scale, 1e-300)


def normal(tokens, experts, seed=0):
    """Return scores `[T, E]` of a standard normal distribution."""
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


def drawn(high, shape):
    """Return whole numbers below `high`."""
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(2))


# By name, for T tokens and E experts: random ones, and those that break solvers.
SCORES = {
    "normal": normal,
    "of a router": lambda t, e: normal(t, 32) @ normal(32, e, 1),
    "experts of unequal appeal": lambda t, e: normal(t, e) + 3 * normal(1, e, 1),
    "one expert preferred by all": lambda t, e: normal(t, e) + 100 * torch.eye(e)[0],
    "all tokens of one order": lambda t, e: normal(t, 1).abs() @ normal(1, e, 1),
    "heavy tails": lambda t, e: normal(t, e) / normal(t, e, 1),
    "very heavy tails": lambda t, e: (5 * normal(t, e).double()).exp(),
    "tokens of unequal scale": lambda t, e: normal(t, e) * (3 * normal(t, 1, 1)).exp(),
    "many ties": lambda t, e: drawn(3, (t, e)).float(),
    "half precision": lambda t, e: normal(t, e).bfloat16(),
    "constant": lambda t, e: torch.full((t, e), 2.5),
    "zeros": torch.zeros,
    "half zeros": lambda t, e: normal(t, e).relu(),
    "the same token": lambda t, e: normal(1, e).expand(t, -1),
    "few kinds of token": lambda t, e: normal(t, e)[drawn(min(5, t), (t,))],
    "negative": lambda t, e: -normal(t, e).abs() - 5,
    "tiny differences": lambda t, e: 1 + 1e-6 * normal(t, e),
    "huge": lambda t, e: 3e37 * normal(t, e),
    "small": lambda t, e: 1e-40 * normal(t, e),
    "one-hot": lambda t, e: torch.eye(e)[drawn(e, (t,))],
}
