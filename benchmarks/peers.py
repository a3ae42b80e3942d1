"""The layers compared: ours, the published reference's way and peers' layers, on the same tokens and expert weights.

Each expert's weights are views of our stacks, so that many experts are in memory only once. Each layer has its own
gradients. Shape suffixes: see `fairseq_hash.moe.losses`.
"""

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec

import torch
import torch.distributed as dist
from fairscale.nn import MOELayer, Top2Gate
from torch import Tensor, nn

from fairseq_hash.moe.experts import ExpertFeedForward

# Some CPUs take seconds for 500 rows and columns in half precision.
LARGE_PRODUCT = {"cpu": 512, "cuda": 8192}
# Entries of one of fairscale's masks, of which it keeps about eight in fp32 at a time: 8 GiB and 32 GiB.
LARGEST_MASK = {"cpu": 2**28, "cuda": 2**30}


def feed_forward(width: int, hidden: int) -> nn.Sequential:
    """Return a dense FFN."""
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


def one_by_one(experts: ExpertFeedForward) -> nn.ModuleList:
    """Return our experts as one network each, with their own parameters over the same memory."""
    networks = nn.ModuleList()
    with torch.device("meta"):  # once, because this also draws initial weights, slowly
        empty = feed_forward(experts.fc1_weight.shape[2], experts.fc1_weight.shape[1])
    for values in zip(experts.fc1_weight, experts.fc1_bias, experts.fc2_weight, experts.fc2_bias, strict=True):
        network = copy.deepcopy(empty)
        parameters = [nn.Parameter(value.detach()) for value in values]
        network[0].weight, network[0].bias, network[2].weight, network[2].bias = parameters
        networks.append(network)
    return networks


class MaskAndLoop(nn.Module):
    """The published reference's way: every expert masks its tokens, runs, and writes back its output."""

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
    """Make a process group of one rank, without which fairscale's layer does not run."""
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
    """Return fairscale's layer with its own gate: two experts per token, in buffers of 2 T / E rows."""
    return MOELayer(Top2Gate(width, len(networks)), networks, dist.group.WORLD)


def transformers_version() -> "str | None":
    """Return the installed version of transformers, if any."""
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
            expert_capacity=tokens,  # its default is 64 rows, beyond which it drops
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
