"""The layers that `layer.py` measures at one number of experts and of tokens, and the parts of the hash layer.

Shape suffixes: see `fairseq_hash.moe.losses`.
"""

import argparse
import dataclasses
import gc
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peers import (
    LARGE_PRODUCT,
    MaskAndLoop,
    TransformersSwitch,
    fairscale_obstacle,
    fairscale_top_2,
    feed_forward,
    one_by_one,
)
from rounds import Call
from torch import Tensor, nn

import fairseq_hash.moe.kernels.feed_forward as by_ways
from fairseq_hash.hashing import TableShape, build_table
from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.balanced_assignment import balanced_assignment
from fairseq_hash.moe.dispatch_plan import DispatchPlan
from fairseq_hash.moe.dispatchers import make_dispatcher
from fairseq_hash.moe.experts import ExpertFeedForward
from fairseq_hash.moe.kernels.cpu_threads import for_each_group
from fairseq_hash.moe.kernels.huge_pages import empty_in_huge_pages
from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.routers import BaseRouter, RouterSettings, router_class
from fairseq_hash.moe.routing_context import HashRoute, RoutingContext
from fairseq_hash.moe.token_dispatcher import combine, dispatch
from fairseq_hash.options.sparse_options import SparseOptions
from fairseq_hash.parallel.groups import ExpertParallel

VOCABULARY = 8000
# Our layers with a learned or a frozen router, by the options that make them.
ROUTERS: dict[str, dict[str, Any]] = {
    "switch": {"router": "switch"},
    "topk-loss": {"router": "topk"},
    "topk-bias": {"router": "topk", "balancing": "bias", "router_score": "sigmoid"},
    "topk-quantile": {"router": "topk", "balancing": "quantile", "router_score": "sigmoid"},
    "gshard": {"router": "gshard"},
    "sinkhorn": {"router": "sinkhorn"},
    "expert-choice": {"router": "expert-choice", "capacity_factor": 1.0, "eval_capacity_factor": 1.0},
    "stablemoe": {"router": "stablemoe"},
    "random-linear": {"router": "random-linear"},
}
# For the output, relative to its largest entry: sums of some hundreds of products in another order, then rounded.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}
# For a gradient, relative to its norm: ReLU's gradient jumps if other rounding takes a value across zero. A grouped
# product in bfloat16 rounds once more, before the bias: 1e-2 to 2e-2, and 8e-2 of the largest entry.
GRADIENT_TOLERANCE = {torch.float32: 3e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def draw_experts(num_experts: int, width: int, hidden: int, seed: int, here: Mapping[str, Any]) -> ExpertFeedForward:
    """Return experts drawn on their device in their dtype; on the CPU, as in training, many would take minutes."""
    with torch.device("meta"):
        experts = ExpertFeedForward(range(num_experts), width, hidden, torch.relu, 0.0, (0,))
    generator = torch.Generator(here["device"]).manual_seed(seed)
    for name, parameter in list(experts.named_parameters()):
        bound = 1 / math.sqrt(width if name.startswith("fc1") else hidden)
        values = empty_in_huge_pages(parameter.shape, torch.empty(0, **here))
        setattr(experts, name, nn.Parameter(values.uniform_(-bound, bound, generator=generator)))
    return experts


def reason(error: Exception) -> str:
    """Return an error in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def make_route(expert_TK: Tensor, parallel: ExpertParallel) -> HashRoute:
    """Return a hash route, as the decoder makes it."""
    return HashRoute(Assignment(expert_TK), make_dispatcher(parallel).begin(expert_TK))


def run_experts(experts: nn.Module, rows_RD: Tensor, plan: DispatchPlan) -> Tensor:
    """Apply the experts to dispatched rows, as the layer does."""
    return experts(rows_RD, plan.sizes)


class Case:
    """The layers of one number of experts and of tokens, on the same tokens and expert weights."""

    def __init__(self, num_experts: int, tokens: int, arguments: argparse.Namespace) -> None:
        torch.manual_seed(arguments.seed)
        self.num_experts, self.tokens = num_experts, tokens
        self.width, self.hidden, self.backward = arguments.width, arguments.hidden, not arguments.forward_only
        self.here = {"device": torch.device(arguments.device), "dtype": getattr(torch, arguments.dtype)}
        self.device, self.dtype = self.here["device"], self.here["dtype"]
        zipf_V = 1 / torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
        symbols, counts = [str(token) for token in range(VOCABULARY)], (1_000_000 * zipf_V).long().tolist()
        table = build_table("balanced", symbols, counts, TableShape(num_experts), arguments.seed)
        self.expert_HK = torch.from_numpy(table.expert_HK).to(self.device)
        self.token_T = torch.multinomial(zipf_V, tokens, replacement=True).to(self.device)
        self.x_LBD, self.grad_LBD = torch.randn(2, tokens, 1, self.width).to(**self.here)
        self.x_LBD.requires_grad_(self.backward)
        self.large_product = LARGE_PRODUCT[self.device.type]
        self.parallel = ExpertParallel(num_experts)
        experts = draw_experts(num_experts, self.width, self.hidden, arguments.seed, self.here)
        self.experts = experts.train(self.backward)
        self.networks = one_by_one(self.experts)
        self.base_router = BaseRouter(self.width, num_experts, 0).to(**self.here)

    def route(self) -> HashRoute:
        """Look the experts up and make the plan."""
        return make_route(self.expert_HK.index_select(0, self.token_T), self.parallel)

    def call(self, forward: Callable[[Tensor], Tensor], module: nn.Module) -> Call:
        """Return the call of a whole layer."""
        module.train(self.backward)
        leaves = [self.x_LBD, *module.parameters()]
        return Call(lambda: forward(self.x_LBD), leaves, self.grad_LBD if self.backward else None)

    def sparse(self, router: "nn.Module | None") -> Call:
        """Return our layer with a router, or with the hash route."""
        hash_route = 0 if router is None else None
        dispatcher = make_dispatcher(self.parallel)
        layer = SparseLayer(router, self.experts, dispatcher, hash_route=hash_route).to(**self.here)
        if router is None:
            return self.call(lambda x_LBD: layer(x_LBD, RoutingContext(None, [self.route()]))[0], layer)
        context = RoutingContext(None, token_BL=self.token_T.unsqueeze(0))
        return self.call(lambda x_LBD: layer(x_LBD, context)[0], layer)

    def router(self, name: str) -> nn.Module:
        """Return one of `ROUTERS`."""
        options = SparseOptions(num_experts=self.num_experts, sparse_layers="0", **ROUTERS[name])
        settings = RouterSettings(self.width, self.num_experts, 0, self.parallel, options, VOCABULARY)
        return router_class(options.router).build(settings)

    @property
    def way(self) -> str:
        """The implementation by which the package runs these experts here."""
        weights = by_ways.Weights(self.experts.fc1_weight, None, self.experts.fc2_weight, None)
        return by_ways.choose_way(self.x_LBD.squeeze(1), weights)

    def by_way(self, way: str) -> Call:
        """Return our layer with the hash route and this implementation of its experts."""
        call, choose = self.sparse(None), by_ways.choose_way

        def forward() -> Tensor:
            by_ways.choose_way = lambda *_: way
            try:
                return call.forward()
            finally:
                by_ways.choose_way = choose

        return dataclasses.replace(call, forward=forward)

    def mask_and_loop(self) -> Call:
        """Return the published reference's way."""
        layer = MaskAndLoop(self.networks)
        return self.call(
            lambda x_LBD: layer(x_LBD.squeeze(1), self.expert_HK[self.token_T, 0]).unsqueeze(1),
            layer,
        )

    def other(self, make: Callable[[], nn.Module]) -> Call:
        """Return a layer of activations alone."""
        layer = make().to(self.device)
        return self.call(layer, layer)

    def candidates(self, names: Sequence[str], ways: Sequence[str] = ()) -> tuple[dict[str, Call], list[str]]:
        """Return the layers by name, each run once, and a line for each layer that cannot run here.

        Raises the errors of dense and hash: without these two there is nothing to measure.
        """
        makers: dict[str, Callable[[], Call]] = {
            "dense": lambda: self.other(lambda: feed_forward(self.width, self.hidden).to(**self.here)),
            "hash": lambda: self.sparse(None),
            **{f"hash ({way})": lambda way=way: self.by_way(way) for way in ways},
            **{name: lambda name=name: self.sparse(self.router(name)) for name in ROUTERS},
            "base": lambda: self.sparse(self.base_router),
            "mask-and-loop": self.mask_and_loop,
            "fairscale": lambda: self.other(lambda: fairscale_top_2(self.networks, self.width)),
            "transformers": lambda: self.other(
                lambda: TransformersSwitch(self.networks, self.width, self.hidden, self.tokens)
            ),
        }
        calls, left_out = {}, []
        shared = [self.x_LBD, *self.experts.parameters(), *self.networks.parameters()]
        for name, make in makers.items():
            if name not in names and not name.startswith("hash ("):
                continue
            obstacle = None
            if name == "fairscale":
                obstacle = fairscale_obstacle(self.tokens, self.num_experts, self.dtype, self.device)
            if not obstacle:
                try:
                    call = make()
                    call.run()
                    calls[name] = call
                except Exception as error:  # a peer may raise anything
                    if name in ("dense", "hash"):
                        raise
                    obstacle = reason(error)
                for leaf in calls[name].leaves if name in calls else shared:
                    leaf.grad = None
            if obstacle:
                left_out.append(self.without(name, obstacle))
                gc.collect()
                torch.cuda.empty_cache()
        return calls, left_out

    def without(self, name: str, why: str) -> str:
        """Return the line about a layer that is left out."""
        return f"{name} is left out with {self.num_experts} experts, {self.tokens} tokens: {why}"

    def pieces(self, with_assignment: bool) -> dict[str, Call]:
        """Return the parts of the hash layer, and the calls measured beside them."""
        plan = self.route().plan
        x_TD, grad_TD = self.x_LBD.detach().squeeze(1), self.grad_LBD.squeeze(1)
        rows_RD, grad_RD = dispatch(x_TD, plan), dispatch(grad_TD, plan)
        size = self.large_product
        square, out = torch.randn(size, size, **self.here), torch.empty(size, size, **self.here)

        def piece(forward: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, weights: Iterable[Tensor] = ()) -> Call:
            x = x.clone().requires_grad_(self.backward)
            return Call(lambda: forward(x), [x, *weights], grad if self.backward else None)

        def assign() -> Tensor:
            return balanced_assignment(F.linear(x_TD.float(), self.base_router.centroids.detach().float()))

        assignment = {"assignment": Call(assign)} if with_assignment else {}
        return {
            "route": Call(lambda: self.route().plan.choice_R),
            "gather": piece(lambda x: dispatch(x, plan), x_TD, grad_RD),
            "experts": piece(
                lambda x: run_experts(self.experts, x, plan), rows_RD, grad_RD, list(self.experts.parameters())
            ),
            "combine": piece(lambda x: combine(x, plan, None), rows_RD, grad_TD),
            "matmuls": self.matmuls(rows_RD, grad_RD, plan),
            **assignment,
            "rate": Call(lambda: torch.mm(square, square, out=out)),
        }

    def matmuls(self, rows_RD: Tensor, grad_RD: Tensor, plan: DispatchPlan) -> Call:
        """Return the experts' matrix products alone, forward and backward, into buffers."""
        fc1_EFD, fc2_EDF = self.experts.fc1_weight.detach(), self.experts.fc2_weight.detach()
        hidden_RF = torch.randn(len(rows_RD), self.hidden, **self.here)
        rows_like = rows_RD, hidden_RF, grad_RD, torch.empty_like(rows_RD), torch.empty_like(hidden_RF)
        gradients = [torch.zeros_like(weight) if self.backward else weight for weight in (fc1_EFD, fc2_EDF)]
        work, on_cpu = fc1_EFD[0].numel(), self.device.type == "cpu"

        def forward(expert: int, first: int, end: int) -> None:
            rows, hidden, _, rows_out, hidden_out = (like[first:end] for like in rows_like)
            torch.mm(rows, fc1_EFD[expert].t(), out=hidden_out)
            torch.mm(hidden, fc2_EDF[expert].t(), out=rows_out)

        def backward(expert: int, first: int, end: int) -> None:
            rows, hidden, grad, rows_out, hidden_out = (like[first:end] for like in rows_like)
            torch.mm(grad.t(), hidden, out=gradients[1][expert])
            torch.mm(grad, fc2_EDF[expert], out=hidden_out)
            torch.mm(hidden_out.t(), rows, out=gradients[0][expert])
            torch.mm(hidden_out, fc1_EFD[expert], out=rows_out)

        def products() -> None:
            for_each_group(forward, plan.sizes.host, 2 * work, on_cpu)
            if self.backward:
                for_each_group(backward, plan.sizes.host, 4 * work, on_cpu)

        return Call(products)

    def check(self, calls: dict[str, Call]) -> list[str]:
        """End the program if mask-and-loop does not give our output and gradients.

        For the hash layer with a named implementation, drop the call instead, and return a line about it.
        """
        left_out = []
        y, *gradients = self._results(calls["mask-and-loop"])
        theirs = [y, *gradients[:1], *(torch.stack(gradients[1 + kind :: 4]) for kind in range(4) if self.backward)]
        del gradients
        for name in [name for name in calls if name.partition(" ")[0] == "hash"]:
            differences = list(map(self._difference, self._results(calls[name]), theirs, range(len(theirs))))
            excess, difference, tolerance = max(differences)
            if excess <= 1:
                continue
            text = f"ours and mask-and-loop differ by {difference:.0e}; rounding is {tolerance}"
            if name == "hash":
                raise SystemExit(f"{sys.argv[0]}: {self.num_experts} experts, {self.tokens} tokens: {text}")
            left_out.append(self.without(name, text))
            del calls[name]
        return left_out

    def _results(self, call: Call) -> list[Tensor]:
        results = [call.run().detach()]
        if self.backward:
            # An expert without tokens has no gradient in a loop.
            results += [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in call.leaves]
        call.clear()
        return results

    def _difference(self, ours: Tensor, theirs: Tensor, number: int) -> tuple[float, float, float]:
        """Return the relative difference divided by its tolerance; the output has the number 0."""
        order, tolerance = (2, GRADIENT_TOLERANCE) if number else (math.inf, TOLERANCE)
        size = torch.linalg.vector_norm(theirs, order, dtype=torch.float32)
        least = torch.finfo(self.dtype).tiny  # both may be zero everywhere
        difference = torch.linalg.vector_norm(ours - theirs, order, dtype=torch.float32) / size.clamp(min=least)
        # NaN does not count as agreement.
        value = math.inf if difference.isnan() else difference.item()
        return value / tolerance[self.dtype], value, tolerance[self.dtype]
