"""Weights of hashed experts against a naive reference: values, gradients, and logits that overflow or underflow."""

import pytest
import reference
import torch

from fairseq_hash.moe.hash_weights import SCORES, HashWeights

WIDTH = 5
# The module computes in fp32, the reference in float64: sums of five products, then a softmax.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


def build(num_experts, score, scale, std=1.0):
    torch.manual_seed(num_experts)
    module = HashWeights(WIDTH, num_experts, score, scale)
    torch.nn.init.normal_(module.weight, std=std)
    return module


@pytest.mark.parametrize("tokens", [0, 1, 13])
@pytest.mark.parametrize("num_experts, choices", [(1, 1), (4, 2), (9, 6)])
@pytest.mark.parametrize("std", [0.5, 4.0])  # the latter for logits from about -20 to 20
@pytest.mark.parametrize("score", SCORES)
def test_weights_equal_naive_loop(score, std, num_experts, choices, tokens):
    module = build(num_experts, score, 1.5, std)
    x_TD = torch.randn(tokens, WIDTH, requires_grad=True)
    expert_TK = torch.stack([torch.randperm(num_experts)[:choices] for _ in range(tokens)]) if tokens else None
    expert_TK = torch.zeros(0, choices, dtype=torch.int64) if expert_TK is None else expert_TK
    weight_TK = module(x_TD, expert_TK)
    assert weight_TK.dtype == torch.float32 and weight_TK.shape == (tokens, choices)
    torch.testing.assert_close(weight_TK.sum(dim=1), torch.full((tokens,), 1.5))

    x_ref = x_TD.detach().double().requires_grad_()
    weight_ref = module.weight.detach().double().requires_grad_()
    pairs = zip(x_ref, expert_TK.tolist(), strict=True)
    rows = [torch.stack(reference.hash_weights(x_D, e_K, weight_ref, score, 1.5)) for x_D, e_K in pairs]
    factor_TK = torch.randn(tokens, choices)
    (weight_TK * factor_TK).sum().backward()
    if not tokens:
        assert not module.weight.grad.any()
        return
    torch.testing.assert_close(weight_TK.double(), torch.stack(rows), **TOLERANCE)
    (torch.stack(rows) * factor_TK.double()).sum().backward()
    for ours, ref in ((x_TD.grad, x_ref.grad), (module.weight.grad, weight_ref.grad)):
        # A gradient is a sum over tokens and experts of terms up to std x |x|: its error is theirs.
        torch.testing.assert_close(ours.double(), ref, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_all_experts_weigh_the_same_at_the_start(score):
    module = HashWeights(WIDTH, 8, score, 2.0)
    assert not module.weight.any()
    weight_TK = module(torch.randn(10, WIDTH), torch.arange(40).view(10, 4) % 8)
    assert torch.equal(weight_TK, torch.full((10, 4), 0.5))
    (weight_TK * torch.randn(10, 4)).sum().backward()
    assert module.weight.grad.abs().min() > 0


@pytest.mark.parametrize(
    "logits",
    [
        [-90.0, -95.0, -100.0],  # the sum is about 1e-20 to 1e-40
        [-110.0, -120.0, -130.0],  # exp is zero in fp32
        [-1e4, -1e4, -1e4],
        [-1e30, -1e30, 1e30],
        [-3e38, 0.0, 3e38],
        [1e4, 90.0, 100.0],
        [-20.0, -20.000002, -19.999998],  # where the way to compute softplus changes
        [20.0, 20.000002, 19.999998],
        [0.0, -1000.0, 5.0],
    ],
)
@pytest.mark.parametrize("score", SCORES)
def test_extreme_logits_give_finite_weights_and_gradients(score, logits):
    """Against logarithms in float64: what fp32's scores cannot hold still has its exact share."""
    module = HashWeights(1, 3, score, 2.5)
    with torch.no_grad():
        module.weight.copy_(torch.tensor(logits).unsqueeze(1))
    x_TD = torch.ones(1, 1, requires_grad=True)
    weight_TK = module(x_TD, torch.tensor([[0, 1, 2]]))
    (weight_TK * torch.tensor([[1.0, -0.5, 2.0]])).sum().backward()
    assert weight_TK.isfinite().all() and module.weight.grad.isfinite().all() and x_TD.grad.isfinite().all()

    exact = module.weight.detach().double().flatten().requires_grad_()
    if score == "sigmoid":
        logarithm = -torch.logaddexp(torch.zeros_like(exact), -exact)
    elif score == "sqrt-softplus":
        # Far below zero the logarithm of softplus is the logit, in float64 too.
        softplus = torch.logaddexp(torch.zeros_like(exact), exact.clamp(min=-300))
        logarithm = torch.where(exact < -300, exact, softplus.log()) / 2
    else:
        logarithm = exact
    weight_ref = logarithm.softmax(dim=0) * 2.5
    (weight_ref * torch.tensor([1.0, -0.5, 2.0])).sum().backward()
    # A logarithm of about -100 is known to 4e-6 in fp32, and so is the weight.
    torch.testing.assert_close(weight_TK.double()[0], weight_ref, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(module.weight.grad.double().flatten(), exact.grad, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_weights_are_computed_in_fp32(score):
    """Half-precision tokens and weights, and autocast, change nothing but what their values are."""
    module = build(8, score, 1.0)
    x_TD = torch.randn(50, WIDTH).bfloat16()
    expert_TK = torch.arange(100).view(50, 2) % 8
    low = module.bfloat16()(x_TD, expert_TK)
    exact = module.float()(x_TD.float(), expert_TK)
    assert low.dtype == torch.float32 and torch.equal(low, exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x_TD, expert_TK), exact)
