"""The router of Switch Transformers. Shape suffixes: see `losses`."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.gate import gate_weights
from fairseq_hash.moe.kernels.group_sizes import count_groups
from fairseq_hash.moe.losses import load_balancing_loss, mean_entropy, z_loss
from fairseq_hash.moe.routers.registry import RouterSettings, register_router
from fairseq_hash.moe.routing_stats import statistic
from fairseq_hash.moe.seeding import seeded_generator


@dataclass(frozen=True)
class SwitchStatistics:
    """What a Switch router logs; the losses are differentiable."""

    router_entropy: Tensor = statistic("mean entropy of the router's probabilities, in nats; 0: it is certain")
    balance_loss: Tensor = statistic("load-balancing loss, without its weight; 1: balanced", "load_balance_weight")
    z_loss: Tensor = statistic("z-loss, without its weight", "z_loss_weight")


def draw_weight(model_width: int, num_experts: int, key: int) -> nn.Parameter:
    """Return `[E, D]`, drawn from a truncated normal of variance 0.1 / D (section 2.4); `key` is of the numbers."""
    weight_ED = nn.Parameter(torch.empty(num_experts, model_width))
    std = math.sqrt(0.1 / model_width)
    generator = seeded_generator("switch router", key)
    nn.init.trunc_normal_(weight_ED, std=std, a=-2 * std, b=2 * std, generator=generator)
    return weight_ED


@register_router("switch")
class SwitchRouter(nn.Module):
    """Learned top-1 routing: the expert's output is scaled by its softmax probability.

    Switch Transformers (Fedus, Zoph, Shazeer 2021), sections 2.1 to 2.4: the router computes in fp32, jitter multiplies
    its input in training, and its weight starts from a truncated normal of variance 0.1 / D.
    """

    top_k = 1
    statistics = SwitchStatistics

    def __init__(self, model_width: int, num_experts: int, jitter: float, key: int, gate: str = "value") -> None:
        super().__init__()
        self.gate = gate
        self.jitter = jitter
        self.weight = draw_weight(model_width, num_experts, key)

    @classmethod
    def build(cls, settings: RouterSettings) -> "SwitchRouter":
        """Make the router of one layer."""
        jitter = settings.options.router_jitter
        return cls(settings.model_width, settings.num_experts, jitter, settings.layer, settings.options.gate)

    def forward(self, x_TD: Tensor) -> Assignment:
        """Assign `x_TD` (any floating dtype) to experts."""
        # Autocast would take the matrix product back to half precision.
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.float()
            if self.training and self.jitter:
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
            logits_TE = F.linear(x_TD, self.weight.float())
            log_probability_TE = logits_TE.log_softmax(dim=-1)
            probability_TE = log_probability_TE.exp()
            weight_TK, expert_TK = probability_TE.max(dim=-1, keepdim=True)
            rows_E = count_groups(expert_TK.flatten(), len(self.weight))
            statistics = SwitchStatistics(
                mean_entropy(probability_TE, log_probability_TE),
                load_balancing_loss(probability_TE, rows_E),
                z_loss(logits_TE),
            )
            return Assignment(expert_TK, gate_weights(weight_TK, self.gate), statistics)
