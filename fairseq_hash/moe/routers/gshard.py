"""The top-2 router of GShard. Shape suffixes: see `losses`."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.kernels.group_sizes import count_groups
from fairseq_hash.moe.losses import load_balancing_loss
from fairseq_hash.moe.routers.registry import RouterSettings, register_router
from fairseq_hash.moe.routing_stats import statistic
from fairseq_hash.moe.seeding import seeded_generator

SECOND_EXPERT_POLICIES = ("sampling", "all", "random")


@dataclass(frozen=True)
class GShardStatistics:
    """What a GShard router logs; the loss is differentiable."""

    router_entropy: Tensor = statistic("mean entropy of the router's probabilities, in nats; 0: it is certain")
    balance_loss: Tensor = statistic(
        "load-balancing loss of the first experts, without its weight; 1: balanced", "load_balance_weight"
    )


@register_router("gshard")
class GShardRouter(nn.Module):
    """Learned top-2 routing: the outputs of both experts, weighted by their probabilities over the sum of the two.

    GShard (Lepikhin et al. 2020), section 2.2 and algorithm 1, in the form of fairscale's `Top2Gate`: in training an
    expert takes all first choices before any second one, and the weights are those of the choices that were not
    dropped. The load-balancing loss is E x E times theirs: 1 at perfect balance, as Switch's. The weight starts as that
    of fairscale's `nn.Linear`. `--capacity-factor 1` is their capacity of 2 T / E rows.

    In evaluation the second expert is the second best one. A full expert then takes choices by position, so that no
    token sees a later one.
    """

    top_k = 2
    statistics = GShardStatistics

    def __init__(self, model_width: int, num_experts: int, second_expert_policy: str, key: int) -> None:
        """Make the router; `second_expert_policy` is one of `SECOND_EXPERT_POLICIES`, see `forward`."""
        super().__init__()
        self.second_expert_policy = second_expert_policy
        bound = 1 / math.sqrt(model_width)
        weight_ED = torch.empty(num_experts, model_width)
        self.weight = nn.Parameter(weight_ED.uniform_(-bound, bound, generator=seeded_generator("gshard router", key)))

    @classmethod
    def build(cls, settings: RouterSettings) -> "GShardRouter":
        """Make the router of one layer."""
        policy = settings.options.second_expert_policy
        return cls(settings.model_width, settings.num_experts, policy, settings.layer)

    def forward(self, x_TD: Tensor) -> Assignment:
        """Assign `x_TD` (any floating dtype) to experts.

        In training, `sampling` draws the second expert by its probability among those beside the first, as fairscale
        does. `all` takes the second best. `random` takes the second best, too, but only with the probability of twice
        its weight: algorithm 1 of the paper.
        """
        # Autocast would take the matrix product back to half precision.
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
            log_probability_TE = logits_TE.log_softmax(dim=-1)
            probability_TE = log_probability_TE.exp()
            expert_TK = self._best_two(probability_TE.detach(), logits_TE.detach())
            weight_TK = probability_TE.gather(1, expert_TK)
            entropy_T = -(probability_TE.detach() * log_probability_TE.detach()).sum(dim=-1)
            first_E = count_groups(expert_TK[:, 0], len(self.weight))
            statistics = GShardStatistics(
                entropy_T.sum() / max(len(entropy_T), 1), load_balancing_loss(probability_TE, first_E)
            )
            order_C = self._firsts_before_seconds(weight_TK.detach()) if self.training else None
            return Assignment(expert_TK, weight_TK, statistics, order_C=order_C, over_kept=True)

    def _best_two(self, probability_TE: Tensor, logits_TE: Tensor) -> Tensor:
        first_TK = probability_TE.argmax(dim=-1, keepdim=True)
        if self.training and self.second_expert_policy == "sampling":
            # The largest of logits plus Gumbel noise, minus the logarithm of an exponential variable, is a sample.
            logits_TE = logits_TE - torch.empty_like(logits_TE).exponential_().log()
        second_TK = logits_TE.scatter(1, first_TK, -math.inf).argmax(dim=-1, keepdim=True)
        return torch.cat([first_TK, second_TK], dim=1)

    def _firsts_before_seconds(self, weight_TK: Tensor) -> Tensor:
        place_KT = torch.arange(weight_TK.numel(), device=weight_TK.device).view_as(weight_TK).t()
        if self.second_expert_policy != "random":
            return place_KT.flatten()
        share_T = weight_TK[:, 1] / weight_TK.sum(dim=1)
        return torch.cat([place_KT[0], place_KT[1][2 * share_T > torch.rand_like(share_T)]])
