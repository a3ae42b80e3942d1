"""The sparse layer against the naive per-token reference: outputs, reports and all gradients."""

import pytest
import reference
import torch
import torch.nn.functional as F

from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.dispatchers import make_dispatcher
from fairseq_hash.moe.experts import ExpertFeedForward, ExpertStack
from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.routers import BaseRouter, SwitchRouter
from fairseq_hash.moe.routing_context import HashRoute, RoutingContext
from fairseq_hash.moe.routing_stats import NoStatistics, RoutingReport, names_of
from fairseq_hash.moe.token_dispatcher import LocalDispatcher
from fairseq_hash.parallel.groups import ExpertParallel

PAD = 1
WIDTH, HIDDEN = 6, 10
# The layer computes in fp32, the reference in fp64: sums of some tens of products differ by a few ulp, times the
# condition of the router's softmax.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


def build(router, num_experts, sublayers, capacity_factor):
    torch.manual_seed(num_experts)
    if sublayers:
        experts = ExpertStack(range(num_experts), sublayers, WIDTH, HIDDEN, F.gelu, 0.0, 0)
        for parameter in experts.parameters():  # a stack starts as nothing: move it away from there
            torch.nn.init.normal_(parameter, std=0.5)
    else:
        experts = ExpertFeedForward(range(num_experts), WIDTH, HIDDEN, F.gelu, 0.0, (0,))
    module = {
        "hash": lambda: None,
        "switch": lambda: SwitchRouter(WIDTH, num_experts, 0.0, 0),
        "base": lambda: BaseRouter(WIDTH, num_experts, 0),
    }[router]()
    if module is not None:
        torch.nn.init.normal_(next(module.parameters()))
    route = 0 if router == "hash" else None
    dispatcher = LocalDispatcher(ExpertParallel(num_experts))
    return SparseLayer(module, experts, dispatcher, capacity_factor, capacity_factor, hash_route=route)


def make_batch(num_experts, padded, capacity_factor, seed):
    """Random tokens [B, L], activations [L, B, D], and the context with a random hash route."""
    generator = torch.Generator().manual_seed(seed)
    token_BL = torch.randint(PAD + 1, 50, (3, 7), generator=generator)
    if padded:
        token_BL[1, 4:] = PAD
        token_BL[2, :2] = PAD
    x_LBD = torch.randn(7, 3, WIDTH, generator=generator)
    table_V = torch.randint(num_experts, (50,), generator=generator)
    context = RoutingContext.of_tokens(token_BL, PAD)
    expert_TK = table_V[context.select(token_BL)].unsqueeze(1)
    route = Assignment(expert_TK), make_dispatcher(ExpertParallel(num_experts)).begin(expert_TK, capacity_factor)
    return token_BL, x_LBD, RoutingContext(context.place_T, [HashRoute(*route)]), table_V


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sublayers", [0, 1, 3])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("num_experts, capacity_factor", [(1, 0.0), (4, 0.0), (4, 0.75), (32, 1.0)])
@pytest.mark.parametrize("router", ["hash", "switch", "base"])
def test_layer_equals_naive_loop(router, num_experts, capacity_factor, padded, sublayers, training):
    layer = build(router, num_experts, sublayers, capacity_factor).train(training)
    token_BL, x_LBD, context, table_V = make_batch(num_experts, padded, capacity_factor, seed=sublayers)
    x_LBD.requires_grad_()
    y_LBD, packed = layer(x_LBD, context)
    report = RoutingReport(packed, layer.statistics)

    # The same in float64, token by token, position first.
    x_ref = x_LBD.detach().double().requires_grad_()
    parameters = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    places = [(i, b) for i in range(7) for b in range(3) if token_BL[b, i] != PAD]
    x_TD = [x_ref[i, b] for i, b in places]
    balance = z = entropy = torch.zeros((), dtype=torch.float64)
    if router == "hash":
        experts = [table_V[token_BL[b, i]].item() for i, b in places]
        gates = [1.0] * len(places)
    elif router == "switch":
        experts, gates, balance, z, entropy = reference.switch_route(x_TD, parameters["router.weight"])
    else:
        centroids = parameters["router.centroids"]
        if training:
            # Which balanced assignment is best is tested in test_assignment; here, that the layer uses it.
            score_TE = torch.stack([centroids.detach() @ x.detach() for x in x_TD])
            experts = layer.router(context.drop_padding(x_LBD)).expert_TK.flatten().tolist()
            counts = [experts.count(e) for e in range(num_experts)]
            assert max(counts) - min(counts) <= 1
            if num_experts <= 4:
                value = sum(score_TE[t, e].item() for t, e in enumerate(experts))
                best = reference.balanced_value(score_TE)
                assert value >= best - 0.0015 * abs(best)
        else:
            experts = reference.base_greedy(x_TD, centroids)
        gates = reference.base_gate(x_TD, centroids, experts)
    kept = reference.kept_under_capacity(experts, num_experts, capacity_factor)
    of_experts = {name.removeprefix("experts."): p for name, p in parameters.items() if name.startswith("experts.")}
    y_TD = reference.sparse_layer(x_TD, experts, gates, kept, of_experts, F.gelu, sublayers)
    y_ref = torch.zeros(7, 3, WIDTH, dtype=torch.float64)
    y_ref = y_ref.index_put((torch.tensor([i for i, _ in places]), torch.tensor([b for _, b in places])), y_TD)

    torch.testing.assert_close(y_LBD.double(), y_ref, **TOLERANCE)
    tokens = len(places)
    assert report.tokens == tokens
    assert report.dropped == kept.count(False)
    assert report.tokens_per_expert_E.tolist() == [experts.count(e) for e in range(num_experts)]
    own = {"balance_loss": balance, "z_loss": z, "router_entropy": entropy} if router == "switch" else {}
    assert set(names_of(layer.statistics)) == set(own)
    for name, mean in own.items():
        torch.testing.assert_close(report.total(name).double(), mean * tokens, **TOLERANCE)

    weight_LBD = torch.randn(7, 3, WIDTH, generator=torch.Generator().manual_seed(9))
    loss, loss_ref = (y_LBD * weight_LBD).sum(), (y_ref * weight_LBD.double()).sum()
    for factor, name in ((0.3, "balance_loss"), (0.2, "z_loss")):
        if name in own:
            loss, loss_ref = loss + factor * report.total(name), loss_ref + factor * own[name] * tokens
    loss.backward()
    loss_ref.backward()
    torch.testing.assert_close(x_LBD.grad.double(), x_ref.grad, **TOLERANCE)
    for name, parameter in layer.named_parameters():
        ref = parameters[name].grad
        ref = torch.zeros_like(parameters[name]) if ref is None else ref
        torch.testing.assert_close(parameter.grad.double(), ref, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("router", ["hash", "switch", "base"])
def test_a_batch_of_nothing_but_padding(router):
    """A rank can hold no token at all: the layer still runs forward and backward, and every gradient is zero."""
    layer = build(router, 4, 0, 1.25)
    context = RoutingContext.of_tokens(torch.full((2, 3), PAD), PAD)
    assignment = Assignment(torch.zeros(0, 1, dtype=torch.int64))
    route = assignment, make_dispatcher(ExpertParallel(4)).begin(assignment.expert_TK)
    context = RoutingContext(context.place_T, [HashRoute(*route)])
    x_LBD = torch.randn(3, 2, WIDTH, requires_grad=True)
    y_LBD, packed = layer(x_LBD, context)
    assert not y_LBD.any() and not packed.any()
    (y_LBD.sum() + packed.sum()).backward()
    assert not x_LBD.grad.any()
    for name, parameter in layer.named_parameters():
        if not name.startswith("router") or parameter.grad is not None:
            assert not parameter.grad.any(), name


def test_jitter_only_in_training_and_within_its_range():
    """Inputs of ones make the jittered logits show the noise itself."""
    torch.manual_seed(0)
    router = SwitchRouter(1, 2, 0.1, 0)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0], [0.0]]))
    x_TD = torch.ones(1000, 1)
    gate = router(x_TD).weight_TK.flatten()
    noise = torch.logit(gate.double())  # the first logit is the jittered input, the second zero
    assert 0.9 <= noise.min() < 0.91 and 1.09 < noise.max() <= 1.1 + 1e-6
    router.eval()
    torch.testing.assert_close(router(x_TD).weight_TK.flatten(), torch.sigmoid(torch.ones(1000)))


def test_switch_routes_in_fp32():
    """Half-precision activations are routed as their fp32 values are, with an fp32 gate."""
    router = SwitchRouter(WIDTH, 8, 0.0, 0)
    x_TD = torch.randn(200, WIDTH).bfloat16()
    exact = router(x_TD.float())
    low = router.bfloat16()(x_TD)
    assert low.weight_TK.dtype == torch.float32
    expected = SwitchRouter(WIDTH, 8, 0.0, 0)
    expected.weight.data = router.weight.data.float()
    again = expected(x_TD.float())
    assert torch.equal(low.expert_TK, again.expert_TK)
    torch.testing.assert_close(low.weight_TK, again.weight_TK, rtol=0, atol=0)
    assert exact.statistics.balance_loss.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(expected(x_TD.float()).weight_TK, again.weight_TK)


def test_expert_dropout_scales_what_it_keeps():
    """With dropout p the hidden layer keeps a share 1 - p, scaled by 1 / (1 - p); evaluation keeps all."""
    torch.manual_seed(1)
    experts = ExpertFeedForward(range(2), 1, 20_000, torch.nn.Identity(), 0.25, (0,))
    with torch.no_grad():
        experts.fc1_weight.fill_(1.0)
        experts.fc1_bias.zero_()
        experts.fc2_weight.fill_(1 / 20_000)
        experts.fc2_bias.zero_()
    x = torch.ones(2, 1)
    # The mean of 20,000 kept-or-not values has a standard deviation of 0.004.
    assert ((experts(x, (1, 1)) - 1).abs() < 0.02).all() and not torch.equal(experts(x, (1, 1)), x)
    # A sum of 20,000 terms in fp32: some hundred ulp.
    torch.testing.assert_close(experts.eval()(x, (1, 1)), x, rtol=1e-4, atol=0)


def test_initial_weights_depend_on_the_seed_alone():
    """Neither what was drawn before nor the experts beside it change an expert's start; the seed does."""

    def weights(seed, num_experts, draw_before):
        torch.manual_seed(seed)
        if draw_before:
            torch.rand(3)
        state = torch.get_rng_state()
        experts = ExpertFeedForward(range(num_experts), WIDTH, HIDDEN, F.relu, 0.0, (2,))
        assert torch.equal(torch.get_rng_state(), state)
        return experts.fc1_weight[1]

    assert torch.equal(weights(5, 4, False), weights(5, 9, True))
    torch.manual_seed(5)
    assert torch.equal(weights(5, 4, False), ExpertFeedForward([3, 1], WIDTH, HIDDEN, F.relu, 0.0, (2,)).fc1_weight[1])
    assert not torch.equal(weights(5, 4, False), weights(6, 4, False))
    # nn.Linear's distribution: uniform within 1 / sqrt(inputs).
    experts = ExpertFeedForward(range(50), WIDTH, HIDDEN, F.relu, 0.0, (0,))
    linear = torch.nn.Linear(HIDDEN, 50 * WIDTH)
    bound = 1 / HIDDEN**0.5
    assert experts.fc2_weight.abs().max() <= bound and linear.weight.abs().max() <= bound
    # 3,000 draws: the standard deviation of their standard deviation is under 1 %.
    torch.testing.assert_close(experts.fc2_weight.std(), linear.weight.std(), rtol=0.05, atol=0)


class ByTokens(torch.nn.Module):
    """A router that sees token ids and sentences, and nothing else."""

    top_k, statistics, sees_tokens = 1, NoStatistics, True

    def forward(self, x_TD, tokens):
        return Assignment(((tokens.id_T + 3 * tokens.sentence_T) % 4).unsqueeze(1))


@pytest.mark.parametrize("padded", [True, False])
def test_a_router_may_see_the_tokens(padded):
    token_BL, x_LBD, _, _ = make_batch(4, padded, 0.0, seed=1)
    experts = ExpertFeedForward(range(4), WIDTH, HIDDEN, F.gelu, 0.0, (0,))
    layer = SparseLayer(ByTokens(), experts, LocalDispatcher(ExpertParallel(4)))
    context = RoutingContext.of_tokens(token_BL, PAD)
    assignment, _, _ = layer.route(context.drop_padding(x_LBD), context)
    places = [(i, b) for i in range(7) for b in range(3) if token_BL[b, i] != PAD]
    assert assignment.expert_TK.flatten().tolist() == [(token_BL[b, i].item() + 3 * b) % 4 for i, b in places]
    with pytest.raises(ValueError, match="of_tokens"):
        layer.route(context.drop_padding(x_LBD), RoutingContext(context.place_T))
