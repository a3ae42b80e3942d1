"""The Sinkhorn router: BASE with an assignment balanced softly, by matrix scaling. Shape suffixes: see `losses`.

Sinkhorn's algorithm scales the rows and columns of exp(scores) in turn, until each token's row sums to 1 / T and each
expert's column to 1 / E. Each token then goes to the largest entry of its row. The scale of a row does not change which
entry that is, and the scales of the columns are E numbers whatever T is. So only they are kept, as logarithms, and
ranks that share the experts balance the batch of all of them by adding up E numbers in each iteration.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.routers.registry import RouterSettings, register_router
from fairseq_hash.moe.routing_stats import statistic
from fairseq_hash.moe.seeding import seeded_generator
from fairseq_hash.parallel.groups import ExpertParallel

SINKHORN_BALANCES = ("global", "local")
LEAST = 1e-30
"""Of a soft load over the mean one, so that its logarithm is finite."""


@dataclass(frozen=True)
class SinkhornStatistics:
    """What a Sinkhorn router logs."""

    sinkhorn_iterations: Tensor = statistic("iterations of Sinkhorn's algorithm in a batch; 0 in evaluation")
    sinkhorn_error: Tensor = statistic(
        "largest relative distance of an expert's soft load from the mean in the last iteration; 0 in evaluation"
    )


@register_router("sinkhorn")
class SinkhornRouter(nn.Module):
    """Sinkhorn's assignment in training, the best expert in evaluation, a sigmoid gate in both.

    S-BASE of Clark et al. 2022 (arXiv 2202.01169), with one expert a token as in Megatron-core's `sinkhorn`. Centroids
    and gate are those of BASE.
    """

    top_k = 1
    statistics = SinkhornStatistics

    def __init__(
        self,
        model_width: int,
        num_experts: int,
        key: int,
        iterations: int = 100,
        tolerance: float = 1e-4,
        add_up: Callable[[Tensor], object] = lambda sums: None,
    ) -> None:
        """Make the centroids; for the other arguments see `column_scales`."""
        super().__init__()
        self.centroids = nn.Parameter(torch.empty(num_experts, model_width))
        nn.init.orthogonal_(self.centroids, gain=0.1, generator=seeded_generator("sinkhorn router", key))
        self.iterations = iterations
        self.tolerance = tolerance
        self.add_up = add_up

    @classmethod
    def build(cls, settings: RouterSettings) -> "SinkhornRouter":
        """Make the router of one layer."""
        options = settings.options
        add_up = add_up_over(options.sinkhorn_balance, settings.parallel)
        sizes = settings.model_width, settings.num_experts, settings.layer
        return cls(*sizes, options.sinkhorn_iterations, options.sinkhorn_tolerance, add_up)

    def forward(self, x_TD: Tensor) -> Assignment:
        """Assign `x_TD` (any floating dtype) to experts."""
        with torch.autocast(x_TD.device.type, enabled=False):
            score_TE = F.linear(x_TD.float(), self.centroids.float())
            scale_E, done, error = score_TE.new_zeros(()), 0, 0.0
            if self.training:
                scale_E, done, error = column_scales(score_TE.detach(), self.iterations, self.tolerance, self.add_up)
            expert_TK = (score_TE.detach() + scale_E).argmax(dim=-1, keepdim=True)
            statistics = SinkhornStatistics(score_TE.new_full((), done), score_TE.new_full((), error))
            return Assignment(expert_TK, score_TE.gather(1, expert_TK).sigmoid(), statistics)


def column_scales(
    score_TE: Tensor, iterations: int, tolerance: float, add_up: Callable[[Tensor], object]
) -> tuple[Tensor, int, float]:
    """Return logarithms of the experts' scales (fp32, `[E]`), how many iterations were made, and the last error.

    Args:
        score_TE: fp32, any T >= 0. The scales do not depend on it in the sense of autograd.
        iterations: the most that are made; each waits for the device once.
        tolerance: the error that ends them: the largest distance of a soft load from the mean load, over the mean.
        add_up: adds up a tensor (fp64) over the ranks whose tokens are balanced together, in place.
    """
    tokens, experts = score_TE.shape
    total = score_TE.new_full((), tokens, dtype=torch.float64)
    add_up(total)
    scale_E, done, error = score_TE.new_zeros(experts), 0, math.inf
    while done < iterations and error > tolerance:
        load_E = (score_TE + scale_E).softmax(dim=1).sum(dim=0, dtype=torch.float64)
        add_up(load_E)
        # The same on every rank to the last bit, so that all end with the same iteration. 0 / 0: no rank has a token.
        relative_E = (load_E * experts / total).nan_to_num(1.0)
        scale_E = scale_E - relative_E.clamp(min=LEAST).log().float()
        error = float((relative_E - 1).abs().max())
        done += 1
    return scale_E, done, error


def add_up_over(balance: str, parallel: ExpertParallel) -> Callable[[Tensor], object]:
    """Return what adds up a tensor, in place: over the ranks that share the experts (`global`), or nothing (`local`).

    If each rank holds all experts, its own tokens are all there are.
    """
    if balance == "local" or not parallel.is_shared:
        return lambda sums: None
    return lambda sums: dist.all_reduce(sums, group=parallel.group)
