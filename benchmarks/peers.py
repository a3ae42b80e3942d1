"""What is compared: ours, the published reference's way and peers' layers, on the same tokens and expert weights.

Each expert's weights are views of our stacks, so that many experts are in memory once; gradients are each layer's own.
Shape suffixes: see `fairseq_hash.losses`.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn import MOELayer, Top2Gate
from rounds import Call
from torch import Tensor, nn

from fairseq_hash.assignment import balanced_assignment
from fairseq_hash.dispatch import DispatchPlan, PlanUnderWay, combine, dispatch
from fairseq_hash.expert_threads import for_each_group
from fairseq_hash.experts import ExpertFeedForward
from fairseq_hash.hashing import TableShape, build_table
from fairseq_hash.layer import HashRoute, RoutingContext, SparseLayer
from fairseq_hash.parallel import ExpertParallel
from fairseq_hash.routers import Assignment, BaseRouter, SwitchRouter

VOCABULARY = 8000
# Relative to a tensor's largest entry: sums of some hundreds of products in another order, then rounded to the dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}
# Some CPUs take seconds for half a thousand rows and columns of half precision.
LARGE_PRODUCT = {"cpu": 512, "cuda": 8192}
# Entries of one of fairscale's masks, of which it keeps about eight in fp32 at a time: 8 GiB and 32 GiB.
LARGEST_MASK = {"cpu": 2**28, "cuda": 2**30}


def feed_forward(width: int, hidden: int) -> nn.Sequential:
    """Return a dense FFN."""
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


def one_by_one(experts: ExpertFeedForward) -> nn.ModuleList:
    """Return our experts as one network each, with parameters of their own over the same memory."""
    networks = nn.ModuleList()
    for values in zip(experts.fc1_weight, experts.fc1_bias, experts.fc2_weight, experts.fc2_bias, strict=True):
        with torch.device("meta"):
            network = feed_forward(values[0].shape[1], values[0].shape[0])
        parameters = [nn.Parameter(value.detach()) for value in values]
        network[0].weight, network[0].bias, network[2].weight, network[2].bias = parameters
        networks.append(network)
    return networks


class MaskAndLoop(nn.Module):
    """The published reference's way: every expert masks its tokens, runs, and writes back what it made."""

    def __init__(self, networks: nn.ModuleList) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, x_TD: Tensor, expert_T: Tensor) -> Tensor:
        """Return `[T, D]`."""
        y_TD = torch.zeros_like(x_TD)
        for expert, network in enumerate(self.networks):
            mask_T = expert_T == expert
            if mask_T.any():
                y_TD[mask_T] = network(x_TD[mask_T])
        return y_TD


@contextmanager
def one_rank(device: torch.device) -> Iterator[None]:
    """Be the only rank of a process group, without which fairscale's layer does not run."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, f"file://{folder}/meeting", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def fairscale_obstacle(tokens: int, num_experts: int, dtype: torch.dtype, device: torch.device) -> "str | None":
    """Return why fairscale's layer cannot run here, or None."""
    if dtype != torch.float32:
        return "its products of fp32 masks take no half precision"
    if tokens % num_experts:
        return "its capacity needs a number of tokens that the number of experts divides"
    if 2 * tokens * tokens > LARGEST_MASK[device.type]:
        return f"its masks would have {2 * tokens * tokens * 4 / 2**30:.0f} GiB each"
    return None


def fairscale_top_2(networks: nn.ModuleList, width: int) -> MOELayer:
    """Return fairscale's layer with its own gate: two experts a token, in buffers of 2 T / E rows."""
    return MOELayer(Top2Gate(width, len(networks)), networks, dist.group.WORLD)


def transformers_version() -> "str | None":
    """Return which transformers is installed, if any."""
    return metadata.version("transformers") if find_spec("transformers") else None


class TransformersSwitch(nn.Module):
    """transformers' `SwitchTransformersSparseMLP`: top-1 by a learned router, its experts without biases."""

    def __init__(self, networks: nn.ModuleList, width: int, hidden: int, tokens: int) -> None:
        super().__init__()
        from transformers import SwitchTransformersConfig
        from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

        config = SwitchTransformersConfig(
            d_model=width,
            d_ff=hidden,
            num_experts=len(networks),
            expert_capacity=tokens,  # its own is 64 rows, beyond which it drops
            router_jitter_noise=0.0,
            dropout_rate=0.0,
            dense_act_fn="relu",
        )
        with torch.device("meta"):
            self.layer = SwitchTransformersSparseMLP(config)
        for number, network in enumerate(networks):
            expert = self.layer.experts[f"expert_{number}"]
            expert.wi.weight, expert.wo.weight = network[0].weight, network[2].weight
        self.layer.router.classifier.weight = nn.Parameter(torch.randn(len(networks), width) / width**0.5)

    def forward(self, x_LBD: Tensor) -> Tensor:
        """Return y for `[T, 1, D]`, which is one sequence."""
        y_BLD = self.layer(x_LBD.transpose(0, 1))
        if isinstance(y_BLD, tuple):  # transformers 4 returns its router's logits, too
            y_BLD = y_BLD[0]
        return y_BLD.transpose(0, 1)


def make_route(expert_TK: Tensor, parallel: ExpertParallel) -> HashRoute:
    """Return a hash route, as the decoder makes it."""
    return HashRoute(Assignment(expert_TK), PlanUnderWay(expert_TK, parallel))


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
        self.expert_HK = table.expert_HK.to(self.device)
        self.token_T = torch.multinomial(zipf_V, tokens, replacement=True).to(self.device)
        self.x_LBD, self.grad_LBD = torch.randn(2, tokens, 1, self.width).to(**self.here)
        self.x_LBD.requires_grad_(self.backward)
        self.large_product = LARGE_PRODUCT[self.device.type]
        self.parallel = ExpertParallel(num_experts)
        experts = ExpertFeedForward(range(num_experts), self.width, self.hidden, torch.relu, 0.0, (0,))
        self.experts = experts.to(**self.here).train(self.backward)
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
        layer = SparseLayer(router, self.experts, self.parallel, 0.0, 0.0, hash_route=hash_route).to(**self.here)
        if router is None:
            return self.call(lambda x_LBD: layer(x_LBD, RoutingContext(None, [self.route()]))[0], layer)
        return self.call(lambda x_LBD: layer(x_LBD, RoutingContext(None))[0], layer)

    def candidates(self) -> tuple[dict[str, Call], list[str]]:
        """Return the layers by name, and a line on each that cannot run here."""
        mask_and_loop = MaskAndLoop(self.networks)
        dense = feed_forward(self.width, self.hidden).to(**self.here)
        calls = {
            "dense": self.call(dense, dense),
            "hash": self.sparse(None),
            "switch": self.sparse(SwitchRouter(self.width, self.num_experts, 0.0, 0)),
            "base": self.sparse(self.base_router),
            "mask-and-loop": self.call(
                lambda x_LBD: mask_and_loop(x_LBD.squeeze(1), self.expert_HK[self.token_T, 0]).unsqueeze(1),
                mask_and_loop,
            ),
        }
        left_out = []
        if obstacle := fairscale_obstacle(self.tokens, self.num_experts, self.dtype, self.device):
            left_out.append(f"fairscale is left out with {self.num_experts} experts, {self.tokens} tokens: {obstacle}")
        else:
            top_2 = fairscale_top_2(self.networks, self.width).to(self.device)
            calls["fairscale"] = self.call(top_2, top_2)
        if transformers_version():
            switch = TransformersSwitch(self.networks, self.width, self.hidden, self.tokens).to(self.device)
            calls["transformers"] = self.call(switch, switch)
        return calls, left_out

    def pieces(self) -> dict[str, Call]:
        """Return the parts of the hash layer, and what is measured beside them."""
        plan = self.route().plan
        x_TD, grad_TD = self.x_LBD.detach().squeeze(1), self.grad_LBD.squeeze(1)
        rows_RD, grad_RD = dispatch(x_TD, plan), dispatch(grad_TD, plan)
        size = self.large_product
        square, out = torch.randn(size, size).to(**self.here), torch.empty(size, size, **self.here)

        def piece(forward: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, weights: Iterable[Tensor] = ()) -> Call:
            x = x.clone().requires_grad_(self.backward)
            return Call(lambda: forward(x), [x, *weights], grad if self.backward else None)

        def assign() -> Tensor:
            return balanced_assignment(F.linear(x_TD.float(), self.base_router.centroids.detach().float()))

        return {
            "route": Call(lambda: self.route().plan.choice_R),
            "gather": piece(lambda x: dispatch(x, plan), x_TD, grad_RD),
            "experts": piece(
                lambda x: run_experts(self.experts, x, plan), rows_RD, grad_RD, list(self.experts.parameters())
            ),
            "combine": piece(lambda x: combine(x, plan, None), rows_RD, grad_TD),
            "matmuls": self.matmuls(rows_RD, grad_RD, plan),
            "assignment": Call(assign),
            "rate": Call(lambda: torch.mm(square, square, out=out)),
        }

    def matmuls(self, rows_RD: Tensor, grad_RD: Tensor, plan: DispatchPlan) -> Call:
        """Return the experts' matrix products alone, forward and backward, into buffers."""
        fc1_EFD, fc2_EDF = self.experts.fc1_weight.detach(), self.experts.fc2_weight.detach()
        hidden_RF = torch.randn(len(rows_RD), self.hidden).to(**self.here)
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

    def check(self, calls: Mapping[str, Call]) -> None:
        """End the program where mask-and-loop does not give our output and gradients."""
        results: dict[str, list[Tensor]] = {}
        for name in ("hash", "mask-and-loop"):
            results[name] = [calls[name].run().detach()]
            if self.backward:
                # An expert without tokens has no gradient in a loop.
                leaves = calls[name].leaves
                results[name] += [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
            calls[name].clear()
        y, *gradients = results["mask-and-loop"]
        theirs = [y, *gradients[:1], *(torch.stack(gradients[1 + kind :: 4]) for kind in range(4) if self.backward)]
        pairs = zip(results["hash"], theirs, strict=True)
        least = torch.finfo(self.dtype).tiny  # both may be zero throughout
        differences = [((a - b).abs().max() / b.abs().max().clamp(min=least)).item() for a, b in pairs]
        if not max(differences) <= TOLERANCE[self.dtype]:  # NaN is no agreement either
            raise SystemExit(
                f"{sys.argv[0]}: {self.num_experts} experts, {self.tokens} tokens: ours and mask-and-loop differ by "
                f"{max(differences):.0e}; rounding is {TOLERANCE[self.dtype]}"
            )
