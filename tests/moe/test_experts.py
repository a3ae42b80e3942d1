"""MultiHash and gated experts against naive per-token references: outputs, all gradients, and what they cost."""

import pytest
import reference
import torch
import torch.nn.functional as F
from made_tensors import LargeTensors

from fairseq_hash.core.errors import UserError
from fairseq_hash.moe.dispatchers import make_dispatcher
from fairseq_hash.moe.experts import ExpertFeedForward, GatedFeedForward
from fairseq_hash.moe.mapped_experts import MappedExperts
from fairseq_hash.moe.token_dispatcher import combine, dispatch
from fairseq_hash.parallel.groups import ExpertParallel

WIDTH, HIDDEN = 6, 12
# Both sides compute in float64; their sums of some tens of products are in another order.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
# Half precision keeps 8 bits: each of some five roundings on the way is off by at most 2^-9 of its value.
HALF_PRECISION = 0.02


def choices(tokens, num_experts, columns, seed=0):
    """Random experts `[T, columns]`; the last expert gets nothing where there are others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(max(num_experts - 1, 1), (tokens, columns), generator=generator)


def through_segments(experts, x_TD, expert_TN, num_experts):
    """Each token through its N segments: what a sparse layer does with N hash functions."""
    segments = expert_TN.shape[1]
    dispatcher = make_dispatcher(ExpertParallel(num_experts * segments))
    plan = dispatcher.begin(expert_TN * segments + torch.arange(segments)).plan
    return combine(experts(dispatch(x_TD, plan), plan.rows_per_expert), plan, None)


def gradients(y, inputs):
    """Gradients of a random sum of y; zero for what y does not depend on."""
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    if y.numel():
        (y * weight).sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in inputs]


def copies(module):
    return {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}


@pytest.mark.parametrize("activation", [F.relu, F.gelu])
@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("num_experts", [1, 2, 7])
@pytest.mark.parametrize("segments", [1, 2, 3, 12])
def test_multi_hash_equals_naive_loop(segments, num_experts, tokens, activation):
    torch.manual_seed(segments)
    experts = ExpertFeedForward(range(num_experts), WIDTH, HIDDEN, activation, 0.0, (0,), segments=segments).double()
    expert_TN = choices(tokens, num_experts, segments)
    x_TD = torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    y_TD = through_segments(experts, x_TD, expert_TN, num_experts)

    x_ref, parameters = x_TD.detach().clone().requires_grad_(), copies(experts)
    pairs = zip(x_ref, expert_TN.tolist(), strict=True)
    rows = [reference.multi_hash(x_D, e_N, *parameters.values(), activation) for x_D, e_N in pairs]
    y_ref = torch.stack(rows) if rows else torch.zeros(0, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(y_TD, y_ref, **TOLERANCE)
    y_TD.sum().backward(retain_graph=True)  # without rows, too, every parameter gets a gradient
    assert all(p.grad is not None for p in experts.parameters())
    experts.zero_grad()
    x_TD.grad = None
    ours = gradients(y_TD, [x_TD, *experts.parameters()])
    for name, grad, ref in zip(["x", *parameters], ours, gradients(y_ref, [x_ref, *parameters.values()]), strict=True):
        torch.testing.assert_close(grad, ref, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_segment_is_the_plain_layer_to_the_last_bit(dtype):
    """Values and gradients of one hash function are those of plain linear layers on each expert's rows."""
    torch.manual_seed(3)
    experts = ExpertFeedForward(range(4), 16, 32, F.gelu, 0.0, (0,), segments=1).to(dtype)
    expert_TN = choices(50, 4, 1)
    x_TD = torch.randn(50, 16, dtype=dtype, requires_grad=True)
    y_TD = through_segments(experts, x_TD, expert_TN, 4)
    y_TD.backward(weight := torch.randn_like(y_TD))

    x_ref, parameters = x_TD.detach().clone().requires_grad_(), copies(experts)
    y_ref = torch.zeros_like(y_TD)
    for e in range(4):
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = (p[e] for p in parameters.values())
        of_expert = (expert_TN == e).any(dim=1)
        hidden = F.gelu(F.linear(x_ref[of_expert], fc1_weight, fc1_bias))
        y_ref[of_expert] = F.linear(hidden, fc2_weight, fc2_bias)
    y_ref.backward(weight)
    assert torch.equal(y_TD, y_ref)
    assert torch.equal(x_TD.grad, x_ref.grad)
    for name, parameter in experts.named_parameters():
        assert torch.equal(parameter.grad, parameters[name].grad), name


def test_hash_functions_that_agree_give_the_plain_layer():
    """Where all N pick the same expert, its segments make up the whole expert."""
    plain = ExpertFeedForward(range(5), WIDTH, HIDDEN, F.gelu, 0.0, (0,)).double()
    cut = ExpertFeedForward(range(5), WIDTH, HIDDEN, F.gelu, 0.0, (0,), segments=4).double()
    cut.load_state_dict(plain.state_dict())  # a checkpoint knows nothing of segments
    x_TD, expert_T1 = torch.randn(30, WIDTH, dtype=torch.float64), choices(30, 5, 1)
    y_TD = through_segments(cut, x_TD, expert_T1.expand(-1, 4), 5)
    torch.testing.assert_close(y_TD, through_segments(plain, x_TD, expert_T1, 5), **TOLERANCE)


@pytest.mark.parametrize("segments", [1, 4])
def test_weights_are_not_copied_and_gradients_are_written_once(segments):
    """No copy of a stack of weights forward; backward one empty stack each, filled in place, laid out as its weight."""
    experts = ExpertFeedForward(range(8), 16, 64, F.relu, 0.0, (0,), segments=segments)
    x_TD = torch.randn(40, 16, requires_grad=True)
    expert_TN = choices(40, 8, segments)
    with LargeTensors(8 * 16 * 64) as mode:
        y_TD = through_segments(experts, x_TD, expert_TN, 8)
        assert not mode.operations
        y_TD.sum().backward()
    assert mode.operations == [torch.ops.aten.new_empty] * 2
    assert all(p.grad.stride() == p.stride() for p in experts.parameters())


def test_frozen_weights_get_no_gradient():
    experts = ExpertFeedForward(range(3), WIDTH, HIDDEN, F.relu, 0.0, (0,), segments=2).requires_grad_(False)
    experts.fc2_weight.requires_grad_()
    x_TD = torch.randn(9, WIDTH, requires_grad=True)
    with LargeTensors(3 * WIDTH * HIDDEN) as mode:
        through_segments(experts, x_TD, choices(9, 3, 2), 3).sum().backward()
    assert mode.operations == [torch.ops.aten.new_empty]
    assert x_TD.grad is not None
    assert [n for n, p in experts.named_parameters() if p.grad is not None] == ["fc2_weight"]


@pytest.mark.parametrize(
    "segments, message", [(5, "12 cannot be cut into 5 .* 1, 2, 3, 4, 6, 12 segments"), (0, "into 0 "), (24, "into 24")]
)
def test_segments_that_do_not_divide_the_hidden_width(segments, message):
    with pytest.raises(UserError, match=message):
        ExpertFeedForward(range(2), WIDTH, HIDDEN, F.relu, 0.0, (0,), segments=segments)


def through_gated(experts, x_TD, expert_TK, weight_TK, num_experts):
    plan = make_dispatcher(ExpertParallel(num_experts)).begin(expert_TK).plan
    return combine(experts(dispatch(x_TD, plan), plan.rows_per_expert), plan, weight_TK)


@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("num_experts", [1, 2, 7])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("limit", [0.0, 0.4, 100.0])
def test_gated_experts_equal_naive_loop(limit, columns, num_experts, tokens):
    torch.manual_seed(columns)
    experts = GatedFeedForward(range(num_experts), WIDTH, HIDDEN, limit, 0.0, (0,)).double()
    expert_TK = choices(tokens, num_experts, columns)
    x_TD = torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    weight_TK = torch.rand(tokens, columns, dtype=torch.float64, requires_grad=True)
    y_TD = through_gated(experts, x_TD, expert_TK, weight_TK, num_experts)

    x_ref, weight_ref = (t.detach().clone().requires_grad_() for t in (x_TD, weight_TK))
    parameters = copies(experts)
    assert list(parameters) == ["gate_up_weight", "down_weight"]
    if tokens == 17 and limit == 0.4:  # the limit cuts some values on each of the three sides, and not all
        hidden = x_ref.detach() @ parameters["gate_up_weight"].detach()[0].t()
        gate, up = hidden[:, :HIDDEN], hidden[:, HIDDEN:]
        assert all(0 < cut.sum() < cut.numel() for cut in (gate > limit, up > limit, up < -limit))
        assert (gate < -limit).any()
    y_ref = torch.zeros(tokens, WIDTH, dtype=torch.float64)
    for t, e_K in enumerate(expert_TK.tolist()):
        of_experts = ([p[e] for p in parameters.values()] for e in e_K)
        y_K = [reference.gated_feed_forward(x_ref[t], *own, limit) for own in of_experts]
        y_D = sum(weight * y for weight, y in zip(weight_ref[t], y_K, strict=True))
        y_ref = y_ref.index_put((torch.tensor([t]),), y_D.unsqueeze(0))
    torch.testing.assert_close(y_TD, y_ref, **TOLERANCE)
    ours = gradients(y_TD, [x_TD, weight_TK, *experts.parameters()])
    refs = gradients(y_ref, [x_ref, weight_ref, *parameters.values()])
    for name, grad, ref in zip(["x", "weight", *parameters], ours, refs, strict=True):
        torch.testing.assert_close(grad, ref, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "build",
    [
        lambda: ExpertFeedForward(range(4), WIDTH, HIDDEN, F.gelu, 0.0, (0,), segments=2),
        # Without a limit: where it cuts, gradients jump, and rounding decides for values beside it.
        lambda: GatedFeedForward(range(4), WIDTH, HIDDEN, 0.0, 0.0, (0,)),
    ],
)
def test_half_precision_under_autocast(build):
    """Products in half precision, parameters and their gradients in fp32, close to fp32's."""
    torch.manual_seed(0)
    results = []
    for half in (False, True):
        experts = build()
        x_TD = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)
        groups = 4 * getattr(experts, "segments", 1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            y_RD = experts(x_TD, (200 // groups,) * groups)
        assert y_RD.dtype == (torch.bfloat16 if half else torch.float32)
        y_RD.float().square().sum().backward()
        results.append([y_RD.float(), x_TD.grad, *(p.grad for p in experts.parameters())])
    for full, half in zip(*results, strict=True):
        assert half.dtype == torch.float32
        assert 0 < (full - half).norm() < HALF_PRECISION * full.norm()


def test_gated_experts_start_as_linear_layers_do():
    """Uniform within 1 / sqrt(inputs), by the seed and the expert alone; nothing is drawn on the device `meta`."""

    def build(ids, key=(2,)):
        torch.manual_seed(5)
        state = torch.get_rng_state()
        experts = GatedFeedForward(ids, 8, 50, 0.0, 0.0, key)
        assert torch.equal(torch.get_rng_state(), state)
        return experts

    every = build(range(40))
    for name, inputs in (("gate_up_weight", 8), ("down_weight", 50)):
        weight, bound = getattr(every, name), inputs**-0.5
        assert 0.99 * bound < weight.abs().max() <= bound
        # A uniform distribution's; some 16,000 draws know theirs to 0.5 %.
        torch.testing.assert_close(weight.std().item(), bound / 3**0.5, rtol=0.03, atol=0)
        shared_out = build([3, 1])
        assert torch.equal(getattr(shared_out, name), weight[[3, 1]])
        assert not torch.equal(weight[0], weight[1])
        assert not torch.equal(getattr(build([0], key=(3,)), name)[0], weight[0])
    with torch.device("meta"):
        assert GatedFeedForward(range(2), 8, 50, 0.0, 0.0, (0,)).down_weight.is_meta


def test_gated_dropout_scales_what_it_keeps():
    """As in the plain experts: a share 1 - p is kept, scaled by 1 / (1 - p); evaluation keeps all."""
    torch.manual_seed(1)
    experts = GatedFeedForward([0], 100, 100, 0.0, 0.25, (0,))
    with torch.no_grad():
        experts.gate_up_weight.fill_(1 / 100)
        experts.down_weight.copy_(torch.eye(100))  # shows the hidden layer as it is
    hidden = F.silu(torch.ones(()))
    y_RD = experts(torch.ones(200, 100), (200,))
    # The share of 20,000 draws has a standard deviation of 0.003.
    assert abs((y_RD == 0).float().mean() - 0.25) < 0.015
    kept = y_RD[y_RD != 0]
    torch.testing.assert_close(kept, (hidden / 0.75).expand_as(kept))
    torch.testing.assert_close(experts.eval()(torch.ones(200, 100), (200,)), hidden.expand(200, 100))


@pytest.mark.parametrize(
    "build",
    [
        lambda: ExpertFeedForward(range(4), WIDTH, HIDDEN, F.gelu, 0.1, (0,), segments=3),
        lambda: GatedFeedForward(range(4), WIDTH, HIDDEN, 0.4, 0.1, (0,)),
    ],
)
def test_experts_that_stay_in_a_file(build):
    """Built without data, they compute with the weights that they are lent."""
    experts = build().eval()
    with torch.device("meta"):
        mapped = MappedExperts(build())
    for name, parameter in experts.named_parameters():
        mapped.leave_in_file(name, parameter.detach())
    groups = 4 * getattr(experts, "segments", 1)
    x_TD = torch.randn(2 * groups, WIDTH)
    assert torch.equal(mapped(x_TD, (2,) * groups), experts(x_TD, (2,) * groups))
