"""The top-k router against a naive loop over the tokens, in float64: choices, weights, statistics and all gradients."""

import math

import pytest
import reference
import torch

from fairseq_hash.moe.expert_bias import BINS
from fairseq_hash.moe.hash_weights import SCORES
from fairseq_hash.moe.routers import SwitchRouter, TopKRouter
from fairseq_hash.moe.routing_context import RoutedTokens

WIDTH, EXPERTS = 6, 5
# fp32 against float64: sums of some products, then exponentials, logarithms and quotients.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


def build(choices, seed=0, **options):
    router = TopKRouter(WIDTH, EXPERTS, choices, 0, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.weight.normal_(generator=generator)
        if router.bias_E is not None:
            router.bias_E.uniform_(-0.5, 0.5, generator=generator)
    return router


def make_tokens(lengths, seed=1):
    """Activations of sequences of these lengths, position by position, as the layers flatten them."""
    generator = torch.Generator().manual_seed(seed)
    places = sorted((i, b) for b, length in enumerate(lengths) for i in range(length))
    sentence_T = torch.tensor([b for _, b in places], dtype=torch.int64)
    x_TD = torch.randn(len(places), WIDTH, generator=generator, requires_grad=True)
    return x_TD, RoutedTokens(torch.zeros_like(sentence_T), sentence_T)


@pytest.mark.parametrize("lengths", [(0, 7, 1, 4), (0, 0)])
@pytest.mark.parametrize(
    "score, balancing, choices, normalize, scale",
    [
        ("softmax", "none", 2, False, 1.0),
        ("softmax", "loss", 3, True, 0.5),
        ("softmax", "quantile", 1, False, 1.0),
        ("sigmoid", "loss", 2, True, 1.0),
        ("sigmoid", "bias", 1, False, 2.5),
        ("sigmoid", "quantile", 2, True, 2.5),
        ("sqrt-softplus", "bias", 3, False, 1.5),
        ("sqrt-softplus", "loss", 2, True, 1.5),
    ],
)
def test_router_equals_naive_loop(score, balancing, choices, normalize, scale, lengths):
    router = build(choices, balancing=balancing, score=score, normalize=normalize, scale=scale, sequence_loss=True)
    x_TD, tokens = make_tokens(lengths)
    made = router(x_TD, tokens)
    x_ref = x_TD.detach().double().requires_grad_()
    weight_ref = router.weight.detach().double().requires_grad_()
    bias_E = torch.zeros(EXPERTS) if router.bias_E is None else router.bias_E
    route = (list(x_ref), weight_ref, choices, score)
    chosen, weights, _, shares, log_sums = reference.topk_route(*route, bias_E.double(), normalize, scale)
    assert made.expert_TK.tolist() == chosen
    assert made.weight_TK.shape == (len(x_TD), choices) and made.weight_TK.dtype == torch.float32
    assert (made.update_sums_N is not None) == (balancing == "quantile")
    if not chosen:
        assert not any(getattr(made.statistics, name) for name in ("router_entropy", "balance_loss", "z_loss"))
        (made.weight_TK.sum() + made.statistics.sequence_loss + made.statistics.z_loss).backward()
        assert not router.weight.grad.any()
        return

    if balancing == "quantile":  # an expert is chosen where its bias is more than it needs
        low, high = float(bias_E.min()) - 1, float(bias_E.max()) + 1
        bin_E = ((bias_E - low) / (high - low) * BINS).long().tolist()
        histogram_EN = made.update_sums_N.view(EXPERTS, BINS)
        loads = [sum(e in best for best in chosen) for e in range(EXPERTS)]
        assert [histogram_EN[e, : bin_E[e]].sum() for e in range(EXPERTS)] == loads

    by_score, *_ = reference.topk_route(*route, torch.zeros(EXPERTS).double(), normalize, scale)
    sequence = 0.0
    for b in range(len(lengths)):
        own = [t for t, sentence in enumerate(tokens.sentence_T.tolist()) if sentence == b]
        if own:
            loss = reference.balance_loss([by_score[t] for t in own], [shares[t] for t in own], is_sequence_wise=True)
            sequence = sequence + len(own) / len(chosen) * loss
    expected = {
        "router_entropy": -sum(s * torch.log(s) for share in shares for s in share) / len(chosen),
        "balance_loss": reference.balance_loss(chosen, shares) if balancing == "loss" else torch.zeros(()),
        "sequence_loss": sequence,
        "z_loss": sum(s * s for s in log_sums) / len(chosen),
        "bias_max": bias_E.abs().max(),
    }
    weight_ref_TK = torch.stack([torch.stack(row) for row in weights])
    torch.testing.assert_close(made.weight_TK.double(), weight_ref_TK, **TOLERANCE)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(made.statistics, name).double(), value.double(), **TOLERANCE, msg=name)
    assert expected["sequence_loss"] > 0.5

    factor_TK = torch.randn(made.weight_TK.shape, generator=torch.Generator().manual_seed(2))
    loss, loss_ref = (made.weight_TK * factor_TK).sum(), (weight_ref_TK * factor_TK.double()).sum()
    for factor, name in ((0.3, "balance_loss"), (0.7, "sequence_loss"), (0.2, "z_loss")):
        loss, loss_ref = loss + factor * getattr(made.statistics, name), loss_ref + factor * expected[name]
    loss.backward()
    loss_ref.backward()
    torch.testing.assert_close(x_TD.grad.double(), x_ref.grad, **TOLERANCE)
    torch.testing.assert_close(router.weight.grad.double(), weight_ref.grad, **TOLERANCE)


def test_one_expert_with_a_loss_is_the_switch_router():
    """To the bit: the first weights, what was drawn, every number and both gradients."""
    torch.manual_seed(3)
    switch, topk = SwitchRouter(WIDTH, EXPERTS, 0.0, 2), TopKRouter(WIDTH, EXPERTS, 1, 2)
    assert torch.equal(switch.weight, topk.weight)
    x_TD, _ = make_tokens((9, 30))
    made = []
    for router in (switch, topk):
        state = torch.get_rng_state()
        x = x_TD.detach().clone().requires_grad_()
        assignment = router(x)
        statistics = assignment.statistics
        factor_TK = torch.randn(39, 1, generator=torch.Generator().manual_seed(2))
        ((assignment.weight_TK * factor_TK).sum() + 0.3 * statistics.balance_loss + 0.1 * statistics.z_loss).backward()
        figures = (statistics.router_entropy, statistics.balance_loss, statistics.z_loss)
        made.append((assignment.expert_TK, assignment.weight_TK, *figures, x.grad, router.weight.grad))
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


def test_it_routes_in_fp32_and_its_bias_stays_in_fp32():
    """Half-precision weights, activations and autocast change nothing but what their values are."""
    router = build(2, balancing="bias", score="sigmoid", normalize=True)
    bias_E = router.bias_E.clone()
    x_TD = torch.randn(50, WIDTH).bfloat16()
    low = router.bfloat16()(x_TD)
    assert router.weight.dtype == torch.bfloat16 and low.weight_TK.dtype == torch.float32
    assert router.bias_E.dtype == torch.float32 and torch.equal(router.bias_E, bias_E)
    exact = router.float()(x_TD.float())
    assert torch.equal(low.weight_TK, exact.weight_TK) and torch.equal(low.expert_TK, exact.expert_TK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x_TD.float()).weight_TK, exact.weight_TK)


def test_logits_that_overflow_or_underflow_give_finite_weights_and_gradients():
    for score in SCORES:
        router = build(2, score=score, normalize=True)
        with torch.no_grad():
            router.weight.copy_(torch.tensor([-1e4, -110.0, 0.0, 95.0, 1e4]).unsqueeze(1).expand(EXPERTS, WIDTH))
        x_TD = torch.eye(WIDTH, requires_grad=True)
        made = router(x_TD)
        (made.weight_TK.sum() + made.statistics.balance_loss).backward()
        assert made.weight_TK.isfinite().all() and router.weight.grad.isfinite().all(), score


@pytest.mark.parametrize("balancing", ["bias", "quantile"])
def test_the_bias_evens_the_load(balancing):
    """Of a router that sends nearly all tokens to two experts: every load comes to within 10 % of the mean."""
    router = build(2, balancing=balancing, score="sigmoid", bias_step=0.01)
    with torch.no_grad():
        router.bias_E.zero_()
        router.weight[:, 0] = torch.tensor([3.0, 2.0, 0.0, -1.0, -2.0])
    x_TD = torch.randn(2000, WIDTH, generator=torch.Generator().manual_seed(4))
    x_TD[:, 0] = 1.0
    spread = []
    for _ in range(100 if balancing == "bias" else 15):
        made = router(x_TD)
        load_E = torch.bincount(made.expert_TK.flatten(), minlength=EXPERTS).double()
        spread.append(float((load_E / load_E.mean() - 1).abs().max()))
        own = () if made.update_sums_N is None else (made.update_sums_N.double(),)
        router.after_update(load_E, *own)
    assert spread[0] > 1 and spread[-1] < 0.1
    assert math.isclose(float(router.bias_E.mean()), 0, abs_tol=1e-6) or balancing == "bias"


def test_evaluation_has_no_histogram_and_a_frozen_router_keeps_its_bias():
    router = build(2, balancing="quantile")
    x_TD, _ = make_tokens((20,))
    made = router(x_TD)
    before = router.bias_E.clone()
    router.weight.requires_grad_(False)
    router.after_update(torch.ones(EXPERTS), made.update_sums_N)
    assert torch.equal(router.bias_E, before)
    router.weight.requires_grad_(True)
    router.after_update(torch.ones(EXPERTS), made.update_sums_N)
    assert not torch.equal(router.bias_E, before)
    router.eval()
    assert router(x_TD).update_sums_N is None
