"""BASE's balanced assignment of scores on a device: SciPy's optimum, and the loads at most one apart."""

import pytest
import torch
from assignments import SCORES, check, normal

from fairseq_hash.moe.balanced_assignment import balanced_assignment

SHAPES = [(64, 4), (200, 8), (512, 16), (1000, 7)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scores", SCORES)
def test_optimal_and_balanced(scores, shape, device):
    check(SCORES[scores](*shape), device)


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (1, 5), (3, 8), (9, 1), (16384, 64)], ids=str)
def test_any_shape_and_repeats(shape, device):
    score_TE = normal(*shape).to(device)
    first, second = balanced_assignment(score_TE), balanced_assignment(score_TE.clone())
    assert torch.equal(first, second)
    load_E = torch.bincount(first.cpu(), minlength=shape[1])
    assert load_E.max() - load_E.min() <= 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(value, device):
    score_TE = normal(10, 4).to(device)
    score_TE[3, 2] = value
    with pytest.raises(ValueError, match="a score for the balanced assignment is (NaN|infinite)"):
        balanced_assignment(score_TE)
