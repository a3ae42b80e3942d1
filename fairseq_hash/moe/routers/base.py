"""The router of BASE layers. Shape suffixes: see `losses`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.balanced_assignment import balanced_assignment
from fairseq_hash.moe.distributed_assignment import balance_over
from fairseq_hash.moe.gate import gate_weights
from fairseq_hash.moe.routers.registry import RouterSettings, register_router
from fairseq_hash.moe.routing_stats import NoStatistics
from fairseq_hash.moe.seeding import seeded_generator


@register_router("base")
class BaseRouter(nn.Module):
    """Balanced assignment in training, the nearest centroid in evaluation, a sigmoid gate in both.

    BASE Layers (Lewis et al. 2021), sections 3.1 to 3.3. The gate, the sigmoid of the token's score for its expert,
    is what trains the centroids; they start orthogonal with gain 0.1, as in the authors' release.

    Attributes:
        is_always_balanced: whether evaluation is balanced as well, over its whole batch: a diagnostic, and no language
            model.
    """

    top_k = 1
    statistics = NoStatistics

    def __init__(
        self,
        model_width: int,
        num_experts: int,
        key: int,
        assign: Callable[[Tensor], Tensor] = balanced_assignment,
        gate: str = "value",
        is_always_balanced: bool = False,
    ) -> None:
        """Make the centroids; `assign` makes experts `[T]` of scores `[T, E]` in training."""
        super().__init__()
        self.assign = assign
        self.gate = gate
        self.is_always_balanced = is_always_balanced
        self.centroids = nn.Parameter(torch.empty(num_experts, model_width))
        nn.init.orthogonal_(self.centroids, gain=0.1, generator=seeded_generator("base router", key))

    @classmethod
    def build(cls, settings: RouterSettings) -> "BaseRouter":
        """Make the router of one layer."""
        assign = balance_over(settings.options.base_balance, settings.parallel)
        gate, is_always_balanced = settings.options.gate, settings.options.base_evaluation == "balanced"
        return cls(settings.model_width, settings.num_experts, settings.layer, assign, gate, is_always_balanced)

    def forward(self, x_TD: Tensor) -> Assignment:
        """Assign `x_TD` (any floating dtype) to experts.

        Raises:
            ValueError: where a score is NaN or infinite and the assignment is balanced.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            score_TE = F.linear(x_TD.float(), self.centroids.float())
            is_balanced = self.training or self.is_always_balanced
            expert_T = self.assign(score_TE.detach()) if is_balanced else score_TE.argmax(dim=-1)
            expert_TK = expert_T.unsqueeze(1)
            return Assignment(expert_TK, gate_weights(score_TE.gather(1, expert_TK).sigmoid(), self.gate))
