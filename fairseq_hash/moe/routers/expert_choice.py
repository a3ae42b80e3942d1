"""The router of Expert Choice: experts choose tokens. Shape suffixes: see `losses`; here C tokens of an expert."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.dispatch_plan import expert_capacity
from fairseq_hash.moe.routers.registry import RouterSettings, register_router
from fairseq_hash.moe.routing_stats import statistic
from fairseq_hash.moe.seeding import seeded_generator


@dataclass(frozen=True)
class ExpertChoiceStatistics:
    """What an Expert Choice router logs."""

    router_entropy: Tensor = statistic("mean entropy of the router's probabilities, in nats; 0: it is certain")
    unserved: Tensor = statistic("share of the tokens that no expert chooses")
    most_experts: Tensor = statistic("largest number of experts that choose one token of a batch")


@register_router("expert-choice")
class ExpertChoiceRouter(nn.Module):
    """Each expert takes the C tokens of the batch that it has the largest probability of; C = T x factor / E.

    Mixture-of-Experts with Expert Choice Routing (Zhou et al. 2022), section 3.2: softmax over the experts, and the
    outputs are scaled by it. A token has from 0 to E experts. The batch is that of this rank.

    Whether an expert takes a token depends on later tokens of the sequence, and on other sequences: the model is an
    oracle (`sees_future`).

    Attributes:
        top_k: how many experts a token has in the mean, rounded; in training.
    """

    statistics = ExpertChoiceStatistics
    sees_future = True

    def __init__(self, model_width: int, num_experts: int, factor: float, eval_factor: float, key: int) -> None:
        """Make the router; the factors are the mean number of experts of a token, in training and in evaluation."""
        super().__init__()
        self.factor = factor
        self.eval_factor = eval_factor
        self.top_k = min(max(round(factor), 1), num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, model_width))
        std = 1 / math.sqrt(model_width)
        nn.init.normal_(self.weight, std=std, generator=seeded_generator("expert choice router", key))

    @classmethod
    def build(cls, settings: RouterSettings) -> "ExpertChoiceRouter":
        """Make the router of one layer."""
        factors = settings.options.capacity_factor, settings.options.eval_capacity_factor
        return cls(settings.model_width, settings.num_experts, *factors, settings.layer)

    def forward(self, x_TD: Tensor) -> Assignment:
        """Let the experts choose among `x_TD` (any floating dtype). K is the most experts that choose one token."""
        # Autocast would take the matrix product back to half precision.
        with torch.autocast(x_TD.device.type, enabled=False):
            log_probability_TE = F.linear(x_TD.float(), self.weight.float()).log_softmax(dim=-1)
            probability_TE = log_probability_TE.exp()
            tokens, experts = probability_TE.shape
            capacity = expert_capacity(tokens, experts, self.factor if self.training else self.eval_factor) or 0
            token_CE = probability_TE.detach().topk(min(capacity, tokens), dim=0).indices
            is_chosen_TE = torch.zeros_like(probability_TE, dtype=torch.bool).scatter_(0, token_CE, True)
            experts_T = is_chosen_TE.sum(dim=1)
            most = int(experts_T.max()) if tokens else 1
            # First the experts that chose the token, then others, which `order_C` leaves out.
            expert_TK = (probability_TE.detach() + is_chosen_TE).topk(most, dim=1).indices
            order_C = is_chosen_TE.gather(1, expert_TK).flatten().nonzero().squeeze(1)
            entropy_T = -(probability_TE.detach() * log_probability_TE.detach()).sum(dim=-1)
            statistics = ExpertChoiceStatistics(
                entropy_T.sum() / max(tokens, 1),
                (experts_T == 0).sum() / max(tokens, 1),
                entropy_T.new_full((), most),
            )
            # The layer's capacity is that of K choices a token, K times C: it drops nothing.
            return Assignment(expert_TK, probability_TE.gather(1, expert_TK), statistics, order_C=order_C)
