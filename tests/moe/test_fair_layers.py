"""What makes routers comparable: a gate of one, a norm of the experts, BASE balanced in evaluation."""

import pytest
import reference
import torch
import torch.nn.functional as F

from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.balanced_assignment import balanced_assignment
from fairseq_hash.moe.dispatchers import make_dispatcher
from fairseq_hash.moe.experts import ExpertFeedForward
from fairseq_hash.moe.gate import gate_weights
from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.routers import BaseRouter, SwitchRouter
from fairseq_hash.moe.routing_context import HashRoute, RoutingContext
from fairseq_hash.parallel.groups import ExpertParallel

WIDTH, HIDDEN, EXPERTS, TOKENS = 6, 10, 4, 21
# fp32 against fp64: sums of some tens of products, and the condition of the norm.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


def layer_of(router, capacity_factor=0.0, norm=None):
    torch.manual_seed(1)
    experts = ExpertFeedForward(range(EXPERTS), WIDTH, HIDDEN, F.gelu, 0.0, (0,))
    if router is not None:
        torch.nn.init.normal_(next(router.parameters()))
    if norm is not None:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    route = 0 if router is None else None
    dispatcher = make_dispatcher(ExpertParallel(EXPERTS))
    return SparseLayer(router, experts, dispatcher, capacity_factor, hash_route=route, norm=norm)


def doubles(layer):
    """Return the parameters in float64, by name; those of the experts without their prefix."""
    named = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    return named, {name.removeprefix("experts."): p for name, p in named.items() if name.startswith("experts.")}


def gates_of(router, x_TD, named, experts):
    if isinstance(router, SwitchRouter):
        return reference.switch_route(x_TD, named["router.weight"])[1]
    return reference.base_gate(x_TD, named["router.centroids"], experts)


def assert_gradients(x_TD, x_ref, layer, named):
    torch.testing.assert_close(x_TD.grad.double(), x_ref.grad, **TOLERANCE)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), named[name].grad, **TOLERANCE, msg=name)


@pytest.mark.parametrize("kind", ["switch", "base"])
def test_a_gate_of_one_keeps_the_gradient_of_the_gate(kind):
    """The output is that of the experts; the router gets the gradient that the gate's value would have had."""
    router = {
        "switch": lambda: SwitchRouter(WIDTH, EXPERTS, 0.0, 0, "one"),
        "base": lambda: BaseRouter(WIDTH, EXPERTS, 0, gate="one"),
    }[kind]()
    layer = layer_of(router)
    x_TD = torch.randn(TOKENS, WIDTH, requires_grad=True)
    assignment = router(x_TD)
    assert torch.equal(assignment.weight_TK, torch.ones(TOKENS, 1))
    y_LBD, _ = layer(x_TD.unsqueeze(1), RoutingContext(None))
    torch.manual_seed(2)
    weight_TD = torch.randn(TOKENS, WIDTH)
    (y_LBD.squeeze(1) * weight_TD).sum().backward()

    named, of_experts = doubles(layer)
    x_ref = x_TD.detach().double().requires_grad_()
    experts = assignment.expert_TK.flatten().tolist()
    y_ref = reference.sparse_layer(x_ref, experts, [1.0] * TOKENS, [True] * TOKENS, of_experts, F.gelu)
    torch.testing.assert_close(y_LBD.squeeze(1).double(), y_ref, **TOLERANCE)
    gates = gates_of(router, x_ref, named, experts)
    by_gate_T = (y_ref * weight_TD).sum(dim=1).detach()  # the derivative of the loss by each gate
    ((y_ref * weight_TD).sum() + sum(g * d for g, d in zip(gates, by_gate_T, strict=True))).backward()
    assert named[f"router.{'weight' if kind == 'switch' else 'centroids'}"].grad.abs().max() > 0.1
    assert_gradients(x_TD, x_ref, layer, named)


def test_the_gates_of_several_experts_sum_to_one():
    weight_TK = torch.rand(5, 3, requires_grad=True)
    assert gate_weights(weight_TK, "value") is weight_TK
    assert torch.equal(gate_weights(weight_TK, "one"), torch.full((5, 3), 1 / 3))


@pytest.mark.parametrize("kind", ["hash", "switch"])
def test_a_norm_of_the_experts_equals_the_naive_loop(kind):
    """LN(x + FFN(x)): also of a dropped token, for which FFN(x) is zero; padding gets zeros."""
    router = SwitchRouter(WIDTH, EXPERTS, 0.0, 0) if kind == "switch" else None
    layer = layer_of(router, 0.75, torch.nn.LayerNorm(WIDTH))
    token_BL = torch.randint(2, 50, (3, 8))
    token_BL[1, 5:] = 1
    context = RoutingContext.of_tokens(token_BL, 1)
    x_LBD = torch.randn(8, 3, WIDTH, requires_grad=True)
    expert_TK = context.select(token_BL).unsqueeze(1) % EXPERTS
    if router is None:
        under_way = make_dispatcher(ExpertParallel(EXPERTS)).begin(expert_TK, 0.75)
        context.hash_routes.append(HashRoute(Assignment(expert_TK), under_way))
    y_LBD, _ = layer(x_LBD, context)
    weight_LBD = torch.randn(8, 3, WIDTH)
    (y_LBD * weight_LBD).sum().backward()

    named, of_experts = doubles(layer)
    x_ref = x_LBD.detach().double().requires_grad_()
    x_TD = context.drop_padding(x_ref)
    experts, gates = expert_TK.flatten().tolist(), [1.0] * len(x_TD)
    if router is not None:
        experts, gates = reference.switch_route(x_TD, named["router.weight"])[:2]
    kept = reference.kept_under_capacity(experts, EXPERTS, 0.75)
    assert not all(kept)
    added_TD = reference.sparse_layer(x_TD, experts, gates, kept, of_experts, F.gelu)
    norm = named["norm.weight"], named["norm.bias"]
    y_TD = torch.stack([reference.layer_norm(x + y, *norm) for x, y in zip(x_TD, added_TD, strict=True)])
    y_ref = context.restore_padding(y_TD, x_LBD.shape)
    torch.testing.assert_close(y_LBD.double(), y_ref, **TOLERANCE)
    assert not y_LBD[5:, 1].any()
    (y_ref * weight_LBD).sum().backward()
    assert_gradients(x_LBD, x_ref, layer, named)


def test_base_balances_in_evaluation_if_it_is_told_to():
    """As in training, and as the assignment of the same scores; otherwise each token has its best expert."""
    torch.manual_seed(3)
    x_TD = torch.randn(TOKENS, WIDTH)
    greedy, balanced = (BaseRouter(WIDTH, EXPERTS, 0, is_always_balanced=sees).eval() for sees in (False, True))
    score_TE = x_TD @ greedy.centroids.t()
    assert torch.equal(greedy(x_TD).expert_TK[:, 0], score_TE.argmax(dim=1))
    expert_T = balanced(x_TD).expert_TK[:, 0]
    assert torch.equal(expert_T, balanced_assignment(score_TE.detach()))
    assert torch.equal(expert_T, greedy.train()(x_TD).expert_TK[:, 0])
    assert sorted(torch.bincount(expert_T).tolist()) == [5, 5, 5, 6]
