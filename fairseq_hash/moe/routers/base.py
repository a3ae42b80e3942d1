"""The router of BASE layers. Shape suffixes: see `losses`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.balanced_assignment import balanced_assignment
from fairseq_hash.moe.distributed_assignment import balance_over
from fairseq_hash.moe.routers.registry import RouterSettings, register_router
from fairseq_hash.moe.routing_stats import NoStatistics
from fairseq_hash.moe.seeding import seeded_generator


@register_router("base")
class BaseRouter(nn.Module):
    """Balanced assignment in training, the nearest centroid in evaluation, a sigmoid gate in both.

    BASE Layers (Lewis et al. 2021), sections 3.1 to 3.3. The gate, the sigmoid of the token's score for its expert,
    is what trains the centroids; they start orthogonal with gain 0.1, as in the authors' release.
    """

    top_k = 1
    statistics = NoStatistics

    def __init__(
        self,
        model_width: int,
        num_experts: int,
        key: int,
        assign: Callable[[Tensor], Tensor] = balanced_assignment,
    ) -> None:
        """Make the centroids; `assign` makes experts `[T]` of scores `[T, E]` in training."""
        super().__init__()
        self.assign = assign
        self.centroids = nn.Parameter(torch.empty(num_experts, model_width))
        nn.init.orthogonal_(self.centroids, gain=0.1, generator=seeded_generator("base router", key))

    @classmethod
    def build(cls, settings: RouterSettings) -> "BaseRouter":
        """Make the router of one layer."""
        assign = balance_over(settings.options.base_balance, settings.parallel)
        return cls(settings.model_width, settings.num_experts, settings.layer, assign)

    def forward(self, x_TD: Tensor) -> Assignment:
        """Assign `x_TD` (any floating dtype) to experts.

        Raises:
            ValueError: where a score is NaN or infinite in training.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            score_TE = F.linear(x_TD.float(), self.centroids.float())
            expert_T = self.assign(score_TE.detach()) if self.training else score_TE.argmax(dim=-1)
            expert_TK = expert_T.unsqueeze(1)
            return Assignment(expert_TK, score_TE.gather(1, expert_TK).sigmoid())
