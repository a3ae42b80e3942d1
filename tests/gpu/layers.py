"""Sparse layers for the tests on a GPU: how they are built, run on a device, and computed by the naive reference.

The reference is per token and in float64, from the parameters and inputs as the dtype under test has rounded them.
"""

from dataclasses import dataclass, replace
from functools import partial

import reference
import torch
import torch.nn.functional as F

from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.dispatchers import make_dispatcher
from fairseq_hash.moe.experts import ExpertFeedForward, ExpertStack, GatedFeedForward
from fairseq_hash.moe.hash_weights import HashWeights
from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.routers import BaseRouter, SwitchRouter, statistics_of
from fairseq_hash.moe.routing_context import HashRoute, RoutingContext
from fairseq_hash.moe.routing_stats import RoutingReport, names_of
from fairseq_hash.moe.token_dispatcher import LocalDispatcher
from fairseq_hash.parallel.groups import ExpertParallel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # at most, of a value
FP32 = 1e-5  # relative to a tensor's largest entry: some tens of products in another order, then a softmax
PAD, VOCABULARY = 1, 50
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}
SCALE = 1.5  # of the weights of several experts


@dataclass(frozen=True)
class Case:
    """A sparse layer and a batch for it.

    Attributes:
        used: the experts that a table names; the others have no tokens.
        roundings: one after the other from the input to a gradient; more where sub-layers follow each other.
    """

    router: str = "hash"
    form: str = "gelu"
    choices: int = 1
    segments: int = 1
    score: str = ""
    sublayers: int = 0
    limit: float = 0.0
    shared: bool = False
    recompute: bool = False
    capacity: float = 0.0
    training: bool = True
    padded: bool = True
    experts: int = 4
    used: tuple[int, ...] = (0, 2, 3)
    width: int = 16
    hidden: int = 32
    length: int = 14
    batch: int = 3
    roundings: int = 8

    def build_experts(self, ids, key):
        if self.form == "gated":
            return GatedFeedForward(ids, self.width, self.hidden, self.limit, 0.0, (key,), self.recompute)
        activation = ACTIVATIONS[self.form]
        if self.sublayers:
            return ExpertStack(ids, self.sublayers, self.width, self.hidden, activation, 0.0, key, self.recompute)
        segments = self.segments if key == 0 else 1
        arguments = (ids, self.width, self.hidden, activation, 0.0, (key,), None, segments)
        return ExpertFeedForward(*arguments, self.recompute)

    def build(self, dtype):
        """Return the layer on the CPU, its parameters rounded."""
        torch.manual_seed(7)
        experts = self.build_experts(range(self.experts), 0)
        if self.sublayers:  # a stack starts as nothing: move it away from there
            for name, parameter in experts.named_parameters():
                torch.nn.init.normal_(parameter, float(name.startswith("norm_weight")), 0.3)
        router = {
            "hash": lambda: HashWeights(self.width, self.experts, self.score, SCALE) if self.score else None,
            "switch": lambda: SwitchRouter(self.width, self.experts, 0.0, 0),
            "base": lambda: BaseRouter(self.width, self.experts, 0),
        }[self.router]()
        if router is not None:
            torch.nn.init.normal_(next(router.parameters()), std=0.5)
        shared = self.build_experts([0], 1) if self.shared else None
        is_hash = self.router == "hash"
        factors = self.capacity, self.capacity
        layer = SparseLayer(
            None if is_hash else router,
            experts,
            LocalDispatcher(ExpertParallel(self.experts)),
            *factors,
            hash_route=0 if is_hash else None,
            hash_weights=router if is_hash else None,
            segments=self.segments,
            top_k=self.choices,
            shared=shared,
        )
        return layer.to(dtype).train(self.training)


@dataclass(frozen=True)
class Batch:
    """Everything on the CPU; `grad_LBD` is what the backward pass starts from."""

    token_BL: torch.Tensor
    x_LBD: torch.Tensor
    grad_LBD: torch.Tensor
    table_VK: torch.Tensor

    @property
    def places(self):
        """Position and sentence of each token that is no padding, position first."""
        return (self.token_BL.t() != PAD).nonzero().tolist()


def far_from_edges(case, layer, x_ND):
    """Return which tokens rounding cannot move over an edge: between two experts, or where a gradient jumps."""
    parameters = {name: p.detach().double() for name, p in layer.named_parameters()}
    margin = 2 * ROUNDING.get(x_ND.dtype, 1e-4)  # two roundings: of a product, and of its sum with the bias
    x_ND = x_ND.double()
    right = torch.ones(len(x_ND), dtype=torch.bool)
    for name in ("router.weight", "router.centroids"):
        if case.router != "hash" and name in parameters:
            best = (x_ND @ parameters[name].t()).topk(2, dim=1).values
            right &= best[:, 0] - best[:, 1] > 1e-3  # these are fp32 whatever the dtype
    for head in ("experts.", "shared."):
        if head + "fc1_weight" in parameters and case.form == "relu":
            linear_NEH = torch.einsum("nd,ehd->neh", x_ND, parameters[head + "fc1_weight"])
            value_NEH = linear_NEH + parameters[head + "fc1_bias"]
            right &= (value_NEH.abs() > margin * linear_NEH.abs()).flatten(1).all(dim=1)
        if head + "gate_up_weight" in parameters and case.limit:
            value_NEH = torch.einsum("nd,ehd->neh", x_ND, parameters[head + "gate_up_weight"])
            right &= ((value_NEH.abs() - case.limit).abs() > margin * case.limit).flatten(1).all(dim=1)
    return right


def draw(case, layer, dtype):
    """Return a batch for a layer, the same for every device."""
    generator = torch.Generator().manual_seed(3)
    token_BL = torch.randint(PAD + 1, VOCABULARY, (case.batch, case.length), generator=generator)
    if case.padded:
        token_BL[1, case.length // 2 :] = PAD
        token_BL[2, :3] = PAD
    tokens = case.batch * case.length
    x_ND = torch.randn(200 * tokens, case.width, generator=generator).to(dtype)
    x_ND = x_ND[far_from_edges(case, layer, x_ND)][:tokens]
    assert len(x_ND) == tokens
    x_LBD = x_ND.view(case.length, case.batch, case.width)
    grad_LBD = torch.randn(x_LBD.shape, generator=generator).to(dtype)
    order_VE = torch.rand(VOCABULARY, len(case.used), generator=generator).argsort(dim=1)
    columns = max(case.choices, case.segments)
    return Batch(token_BL, x_LBD, grad_LBD, torch.tensor(case.used)[order_VE[:, :columns]])


def context_on(case, batch, device, padding=True):
    """Return the context of a forward pass on a device; without `padding` nothing waits for where it stands."""
    token_BL = batch.token_BL.to(device)
    context = RoutingContext.of_tokens(token_BL, PAD) if padding else RoutingContext(None)
    if case.router == "hash":
        context.hash_routes.append(route_on(case, context.select(token_BL), batch.table_VK.to(device)))
    return context


def route_on(case, token_T, table_VK):
    """Return the route as the decoder makes it."""
    expert_TK = table_VK.index_select(0, token_T)
    if case.segments > 1:
        expert_TK = expert_TK * case.segments + torch.arange(case.segments, device=expert_TK.device)
    weight_TK = None
    if case.choices > 1:
        weight_TK = torch.full(expert_TK.shape, SCALE / case.choices, device=expert_TK.device)
    plan = make_dispatcher(ExpertParallel(case.experts).in_segments(case.segments)).begin(expert_TK, case.capacity)
    return HashRoute(Assignment(expert_TK, weight_TK), plan, case.segments)


def report_gradient(case, device):
    """Return the weights of the router's two losses, as the gradient of the packed report."""
    names = names_of(statistics_of(case.router))
    report = RoutingReport(torch.zeros(2 + len(names) + case.experts, device=device), statistics_of(case.router))
    for name, weight in (("balance_loss", 0.03), ("z_loss", 0.02)):
        if name in names:
            report.total(name).fill_(weight)
    return report.sums


def backward(case, y_LBD, packed, grad_LBD, grad_report):
    """Run the backward pass; only learned routing has losses."""
    outputs, grads = [y_LBD], [grad_LBD]
    if packed.requires_grad:
        outputs.append(packed)
        grads.append(grad_report)
    torch.autograd.backward(outputs, grads)


def run(case, layer, batch, device):
    """Return output, packed report and all gradients by name; the layer is on the device already."""
    layer.zero_grad()
    x_LBD = batch.x_LBD.to(device, copy=True).requires_grad_()
    y_LBD, packed = layer(x_LBD, context_on(case, batch, device))
    backward(case, y_LBD, packed, batch.grad_LBD.to(device), report_gradient(case, device))
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in layer.named_parameters()}
    return {"y": y_LBD.detach(), "x": x_LBD.grad, **gradients}, packed.detach()


def of_expert(case, parameters, x_D, experts, head):
    """Return what one expert makes of a token; of MultiHash, what its experts make together."""
    own = {name.removeprefix(head): p for name, p in parameters.items() if name.startswith(head)}
    if case.form == "gated":
        return reference.gated_feed_forward(x_D, *(p[experts[0]] for p in own.values()), case.limit)
    activation = ACTIVATIONS[case.form]
    if case.sublayers:
        return reference.sparse_layer([x_D], experts, [1.0], [True], own, activation, case.sublayers)[0]
    if len(experts) > 1:
        return reference.multi_hash(x_D, experts, *own.values(), activation)
    return reference.feed_forward(x_D, *(p[experts[0]] for p in own.values()), activation)


def expected(case, parameters, batch, experts_of_base=None):
    """Return output, gradients and the report, all in float64: what `run` returns."""
    parameters = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    x_ref = batch.x_LBD.double().requires_grad_()
    x_TD = [x_ref[i, b] for i, b in batch.places]
    balance = z = entropy = torch.zeros((), dtype=torch.float64)
    if case.router == "switch":
        experts, gates, balance, z, entropy = reference.switch_route(x_TD, parameters["router.weight"])
    elif case.router == "base":
        centroids = parameters["router.centroids"]
        experts = experts_of_base if case.training else reference.base_greedy(x_TD, centroids)
        gates = reference.base_gate(x_TD, centroids, experts)
    if case.router == "hash":
        rows = [batch.table_VK[batch.token_BL[b, i]].tolist() for i, b in batch.places]
        weights = [[1.0]] * len(rows)
        if case.score:
            weigh = partial(reference.hash_weights, weight_ED=parameters["router.weight"], score=case.score)
            weights = [weigh(x_D, row, scale=SCALE) for x_D, row in zip(x_TD, rows, strict=True)]
        elif case.choices > 1:
            weights = [[SCALE / case.choices] * case.choices] * len(rows)
    else:
        rows, weights = [[e] for e in experts], [[gate] for gate in gates]
    # Of MultiHash each choice is of a segment of an expert: these have the capacity.
    groups = [e * case.segments + (k if case.segments > 1 else 0) for row in rows for k, e in enumerate(row)]
    kept = reference.kept_under_capacity(groups, case.experts * case.segments, case.capacity)
    y_ref = torch.zeros_like(x_ref)
    columns = max(case.choices, case.segments)
    for t, ((i, b), x_D, row, weight_K) in enumerate(zip(batch.places, x_TD, rows, weights, strict=True)):
        if case.segments > 1:
            y_D = of_expert(case, parameters, x_D, row, "experts.")
        else:
            kept_K = kept[t * columns : (t + 1) * columns]
            parts = [
                w * of_expert(case, parameters, x_D, [e], "experts.")
                for e, w, keep in zip(row, weight_K, kept_K, strict=True)
                if keep
            ]
            y_D = sum(parts, torch.zeros_like(x_D))
        if case.shared:
            y_D = y_D + of_expert(replace(case, segments=1), parameters, x_D, [0], "shared.")
        y_ref = y_ref.index_put((torch.tensor(i), torch.tensor(b)), y_D)
    tokens = len(rows)
    loss = (y_ref * batch.grad_LBD.double()).sum() + (0.03 * balance + 0.02 * z) * tokens
    loss.backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    tokens_per_expert_E = [sum(row.count(e) for row in rows) for e in range(case.experts)]
    report = [
        tokens,
        kept.count(False) / columns,
        *(v.item() * tokens for v in (entropy, balance, z) if case.router == "switch"),
        *tokens_per_expert_E,
    ]
    return {"y": y_ref.detach(), "x": x_ref.grad, **gradients}, torch.tensor(report, dtype=torch.float64)


def assert_near(got, want, tolerance, name):
    """Compare a tensor of the device with one in float64, relative to the largest entry of the latter."""
    got = got.detach().cpu().double()
    assert got.shape == want.shape, name
    error = (got - want).abs().max().item() if want.numel() else 0.0
    largest = want.abs().max().item() if want.numel() else 0.0
    assert error <= tolerance * largest, f"{name}: off by {error:.3g} with entries up to {largest:.3g}"


def tolerance_of(dtype, roundings):
    return roundings * ROUNDING[dtype] if dtype in ROUNDING else FP32


def check(case, dtype, device):
    """Compare a layer on a device with the reference: output, report and every gradient."""
    assert torch.backends.cuda.matmul.allow_tf32 is False
    layer = case.build(dtype)
    batch = draw(case, layer, dtype)
    parameters = {name: p.detach().double() for name, p in layer.named_parameters()}
    layer.to(device)
    experts = None
    if case.router == "base" and case.training:
        x_TD = torch.stack([batch.x_LBD[i, b] for i, b in batch.places])
        with torch.no_grad():
            experts = layer.router(x_TD.to(device)).expert_TK.flatten().tolist()
        score_TE = x_TD.double() @ parameters["router.centroids"].t()
        value = sum(score_TE[t, e].item() for t, e in enumerate(experts))
        # The scores are of fp32: sums of some tens of products.
        assert value >= reference.balanced_value(score_TE) - 1e-5 * score_TE.abs().sum()
    got, packed = run(case, layer, batch, device)
    want, report = expected(case, parameters, batch, experts)
    assert got["y"].dtype == dtype and packed.dtype == torch.float32
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.dtype == dtype and tensor.device.type == device.type
        assert_near(tensor, want[name], tolerance_of(dtype, case.roundings), name)
    ours, theirs = (RoutingReport(sums, statistics_of(case.router)) for sums in (packed.cpu().double(), report))
    assert ours.tokens == theirs.tokens and torch.equal(ours.tokens_per_expert_E, theirs.tokens_per_expert_E)
    torch.testing.assert_close(ours.dropped, theirs.dropped, rtol=1e-6, atol=0)
    for name in names_of(statistics_of(case.router)):
        torch.testing.assert_close(ours.total(name), theirs.total(name), rtol=FP32, atol=1e-6)
    return got
