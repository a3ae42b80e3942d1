"""Routers that decide over a batch (gshard, sinkhorn, expert-choice) against fairscale and naive loops, gradients too.

Each reference is a matrix of gates [T, E]: what scales an expert's output for a token, zero if it does not serve it.
"""

import pytest
import reference
import torch
import torch.nn.functional as F
from fairscale.nn.moe import top2gate

from fairseq_hash.moe.experts import ExpertFeedForward
from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.routers import ExpertChoiceRouter, GShardRouter, SinkhornRouter
from fairseq_hash.moe.routers.sinkhorn import column_scales
from fairseq_hash.moe.routing_context import RoutingContext
from fairseq_hash.moe.routing_stats import RoutingReport
from fairseq_hash.moe.token_dispatcher import LocalDispatcher
from fairseq_hash.parallel.groups import ExpertParallel

PAD, WIDTH, HIDDEN = 1, 6, 10
# The layer computes in fp32, the references in fp64: sums of some tens of products differ by a few ulp.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


def layer_of(router, capacity_factor=0.0, eval_capacity_factor=0.0):
    weight_ED = next(router.parameters())
    torch.nn.init.normal_(weight_ED, generator=torch.Generator().manual_seed(len(weight_ED)))
    experts = ExpertFeedForward(range(len(weight_ED)), WIDTH, HIDDEN, F.gelu, 0.0, (0,))
    dispatcher = LocalDispatcher(ExpertParallel(len(weight_ED)))
    return SparseLayer(router, experts, dispatcher, capacity_factor, eval_capacity_factor)


def batch_of(length, sentences, padded=False, seed=0):
    """Random activations [L, B, D] and their context."""
    generator = torch.Generator().manual_seed(seed)
    token_BL = torch.full((sentences, length), PAD + 1)
    if padded:
        token_BL[0, length // 2 :] = PAD
        token_BL[-1, :2] = PAD
    x_LBD = torch.randn(length, sentences, WIDTH, generator=generator)
    return x_LBD, RoutingContext.of_tokens(token_BL, PAD)


def check(layer, x_LBD, context, gates):
    """Output, report and all gradients are those of the gates that `gates` makes of tokens and the router's weight.

    It returns gates [T, E], the load-balancing loss (or 0), and how many choices were dropped.
    """
    x_LBD = x_LBD.requires_grad_()
    y_LBD, sums = layer(x_LBD, context)
    report, logged = (RoutingReport(values, layer.statistics) for values in (sums, sums.detach()))
    x_ref = x_LBD.detach().double().requires_grad_()
    parameters = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    router_name = next(name for name in parameters if name.startswith("router."))
    x_TD = context.drop_padding(x_ref)
    gate_TE, balance, dropped = gates(x_TD, parameters[router_name])
    names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    y_ETD = [
        torch.stack([reference.feed_forward(x, *(parameters[f"experts.{n}"][e] for n in names), F.gelu) for x in x_TD])
        for e in range(gate_TE.shape[1])
    ]
    y_TD = sum(gate_TE[:, e : e + 1] * y_ETD[e] for e in range(len(y_ETD)))
    y_ref = context.restore_padding(y_TD, x_LBD.shape)
    torch.testing.assert_close(y_LBD.double(), y_ref, **TOLERANCE)
    assert logged.tokens == len(x_TD) and logged.dropped * layer.top_k == dropped
    weight_LBD = torch.randn(x_LBD.shape, generator=torch.Generator().manual_seed(9))
    loss, loss_ref = (y_LBD * weight_LBD).sum(), (y_ref * weight_LBD.double()).sum()
    if isinstance(balance, torch.Tensor):
        total = report.total("balance_loss")
        torch.testing.assert_close(total.double(), balance * len(x_TD), **TOLERANCE)
        loss, loss_ref = loss + total, loss_ref + balance * len(x_TD)
    loss.backward()
    loss_ref.backward()
    torch.testing.assert_close(x_LBD.grad.double(), x_ref.grad, **TOLERANCE)
    for name, parameter in layer.named_parameters():
        expected = parameters[name].grad
        torch.testing.assert_close(parameter.grad.double(), expected, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    return logged


@pytest.mark.parametrize("num_experts", [2, 4, 12])
def test_gshard_equals_fairscales_gate(monkeypatch, num_experts):
    """With its noise and its capacity of 2 T / E: who serves whom, weights, what is dropped, loss, all gradients."""
    layer = layer_of(GShardRouter(WIDTH, num_experts, "sampling", 0), capacity_factor=1.0)
    x_LBD, context = batch_of(8, 3)
    torch.manual_seed(5)
    exponential_TE = torch.empty(24, num_experts).exponential_()
    monkeypatch.setattr(top2gate, "gumbel_rsample", lambda shape, device: -exponential_TE.log())

    def gates(x_TD, weight_ED):
        loss, combine_TEC, mask_TEC = top2gate.top2gating(x_TD @ weight_ED.t())
        return combine_TEC.sum(dim=2), loss * num_experts**2, 2 * len(x_TD) - int(mask_TEC.sum())

    torch.manual_seed(5)
    report = check(layer, x_LBD, context, gates)
    assert num_experts == 2 or report.dropped > 0


@pytest.mark.parametrize("policy", ["sampling", "all", "random"])
@pytest.mark.parametrize("capacity_factor", [0.0, 0.7])
def test_gshard_equals_the_algorithm_of_the_paper(policy, capacity_factor):
    """Token by token, on any number of tokens, beside padding."""
    num_experts = 5
    layer = layer_of(GShardRouter(WIDTH, num_experts, policy, 0), capacity_factor)
    x_LBD, context = batch_of(7, 3, padded=True)
    tokens = len(context.drop_padding(x_LBD))
    torch.manual_seed(5)
    noise_TE = -torch.empty(tokens, num_experts).exponential_().log() if policy == "sampling" else None
    uniform_T = torch.rand(tokens) if policy == "random" else None
    torch.manual_seed(5)
    check(layer, x_LBD, context, lambda x, w: reference.gshard_gates(x, w, capacity_factor, noise_TE, uniform_T))


def test_gshard_draws_second_experts_by_their_probabilities():
    router = layer_of(GShardRouter(WIDTH, 4, "sampling", 0)).router
    x_TD = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1)).expand(20_000, -1)
    torch.manual_seed(0)
    first_TK, second_TK = router(x_TD).expert_TK.chunk(2, dim=1)
    probability_E = (x_TD[0] @ router.weight.t()).softmax(dim=0).detach()
    assert (first_TK == probability_E.argmax()).all()
    probability_E[probability_E.argmax()] = 0
    share_E = torch.bincount(second_TK.flatten(), minlength=4) / 20_000
    # The standard deviation of a share is at most 0.004.
    torch.testing.assert_close(share_E, probability_E / probability_E.sum(), rtol=0, atol=0.016)


def test_gshard_sees_no_later_token_in_evaluation():
    """Without noise, and with choices kept by position."""
    layer = layer_of(GShardRouter(WIDTH, 4, "sampling", 0), 1.0, 0.5).eval()
    x_LBD, context = batch_of(20, 2)
    y_LBD, sums = layer(x_LBD, context)
    assert RoutingReport(sums, layer.statistics).dropped > 0
    assert torch.equal(layer(x_LBD, context)[0], y_LBD)
    changed_LBD = torch.cat([x_LBD[:10], torch.randn(10, 2, WIDTH)])
    torch.testing.assert_close(layer(changed_LBD, context)[0][:10], y_LBD[:10], rtol=1e-5, atol=1e-6)


# The last: exp of its scores overflows fp32.
@pytest.mark.parametrize(("iterations", "scale"), [(1, 1.0), (3, 1.0), (30, 1.0), (200, 40.0)])
def test_sinkhorn_equals_scaling_rows_and_columns(iterations, scale):
    layer = layer_of(SinkhornRouter(WIDTH, 5, 0, iterations, tolerance=0.0))
    x_LBD, context = batch_of(7, 3, padded=True)

    def gates(x_TD, weight_ED):
        score_TE = x_TD @ weight_ED.t()
        entry_TE, _ = reference.sinkhorn(score_TE.tolist(), iterations)
        return F.one_hot(entry_TE.argmax(dim=1), 5) * score_TE.sigmoid(), None, 0

    report = check(layer, scale * x_LBD, context, gates)
    assert report.mean(report.total("sinkhorn_iterations")) == iterations


def test_sinkhorn_ends_at_its_tolerance():
    """Where the loop does, with its scales and soft loads as even as asked for; hard loads become even, too."""
    generator = torch.Generator().manual_seed(0)
    score_TE = torch.randn(600, 6, generator=generator) + torch.randn(6, generator=generator)
    scale_E, done, error = column_scales(score_TE, 100, 1e-3, lambda sums: None)
    entry_TE, errors = reference.sinkhorn(score_TE.tolist(), done)
    assert error == pytest.approx(errors[-1], rel=1e-2) and error <= 1e-3 < errors[-2]
    scaled_TE = entry_TE.log() - score_TE  # the scale of the row plus that of the column
    torch.testing.assert_close(scale_E - scale_E[0], (scaled_TE[0] - scaled_TE[0, 0]).float(), rtol=0, atol=1e-5)
    load_E = (score_TE + scale_E).softmax(dim=1).mean(dim=0) * 6
    torch.testing.assert_close(load_E, torch.ones(6), rtol=0, atol=1e-3)
    greedy, balanced = (torch.bincount(s.argmax(dim=1), minlength=6) for s in (score_TE, score_TE + scale_E))
    assert greedy.max() > 170 and balanced.max() < 115


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("num_experts", "factor"), [(5, 2.0), (3, 0.5), (4, 4.0), (30, 1.0)])
def test_expert_choice_equals_sorting_by_each_expert(num_experts, factor, training):
    factors = (factor, 9.0) if training else (9.0, factor)
    layer = layer_of(ExpertChoiceRouter(WIDTH, num_experts, *factors, 0), *factors).train(training)
    x_LBD, context = batch_of(7, 3, padded=True)
    gates = {}

    def gates_of(x_TD, weight_ED):
        gates["TE"] = reference.expert_choice_gates(x_TD, weight_ED, factor)
        return gates["TE"], None, 0

    report = check(layer, x_LBD, context, gates_of)
    served_TE = gates["TE"] > 0
    assert torch.equal(report.tokens_per_expert_E, served_TE.sum(dim=0).float())
    assert report.mean(report.total("unserved")) == pytest.approx((~served_TE.any(dim=1)).float().mean().item())
    assert report.mean(report.total("most_experts")) == served_TE.sum(dim=1).max()


@pytest.mark.parametrize(
    "router",
    [GShardRouter(WIDTH, 4, "random", 0), SinkhornRouter(WIDTH, 4, 0), ExpertChoiceRouter(WIDTH, 4, 2.0, 2.0, 0)],
    ids=["gshard", "sinkhorn", "expert-choice"],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_nothing_but_padding(router, training):
    """The layer still runs forward and backward; output, report and gradients are zero."""
    layer = layer_of(router, 1.25, 1.25).train(training)
    x_LBD = torch.randn(3, 2, WIDTH, requires_grad=True)
    y_LBD, sums = layer(x_LBD, RoutingContext.of_tokens(torch.full((2, 3), PAD), PAD))
    assert not y_LBD.any() and not sums.any()
    (y_LBD.sum() + sums.sum()).backward()
    assert not x_LBD.grad.any() and all(not p.grad.any() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("make", [GShardRouter, SinkhornRouter, ExpertChoiceRouter])
def test_they_route_half_precision_in_fp32(make):
    more = {GShardRouter: ("all",), SinkhornRouter: (), ExpertChoiceRouter: (2.0, 2.0)}[make]
    router = make(WIDTH, 8, *more, key=0)
    x_TD = torch.randn(200, WIDTH).bfloat16()
    low = router.bfloat16()(x_TD)
    exact = router.float()(x_TD.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x_TD.float()).weight_TK, exact.weight_TK)
    assert torch.equal(low.weight_TK, exact.weight_TK) and low.weight_TK.dtype == torch.float32
