"""A router that learns nothing: a frozen random projection of the token's activation. Shape suffixes: see `losses`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.routers.registry import RouterSettings, register_router
from fairseq_hash.moe.routing_stats import NoStatistics
from fairseq_hash.moe.seeding import seeded_generator


@register_router("random-linear")
class RandomLinearRouter(nn.Module):
    """The expert with the largest score x . w, where all w are drawn once from a normal distribution and never change.

    An ablation of ours. It is fixed as a hash layer is, but sees the context as a learned router does, at the same cost
    as Switch. As in Hash Layers (Roller et al. 2021, section 3) the expert's output is used as it is, because a gate
    would be trained.
    """

    top_k = 1
    statistics = NoStatistics
    weight: Tensor

    def __init__(self, model_width: int, num_experts: int, key: int) -> None:
        super().__init__()
        generator = seeded_generator("random linear router", key)
        # A buffer, so that it is saved, has no gradient, and no optimizer or weight decay changes it.
        self.register_buffer("weight", torch.empty(num_experts, model_width).normal_(generator=generator))

    @classmethod
    def build(cls, settings: RouterSettings) -> "RandomLinearRouter":
        """Make the router of one layer."""
        return cls(settings.model_width, settings.num_experts, settings.layer)

    def forward(self, x_TD: Tensor) -> Assignment:
        """Assign `x_TD` (any floating dtype) to experts."""
        # Autocast would take the matrix product back to half precision.
        with torch.no_grad(), torch.autocast(x_TD.device.type, enabled=False):
            return Assignment(F.linear(x_TD.float(), self.weight.float()).argmax(dim=-1, keepdim=True))
