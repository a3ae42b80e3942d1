"""The experts in fairscale's `MOELayer`: an exchange of full capacity buffers, as in GShard, in place of exact rows.

GShard (Lepikhin et al. 2020), section 2.2: every rank sends C rows to each expert, empty ones included. Which choices
are kept is the plan's business, so that the result is that of our own exchange. fp32 only: `MOELayer` multiplies with
fp32 masks. Shape suffixes: see `losses`; C here is the number of rows in a buffer.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.dispatch_plan import DispatchPlan
from fairseq_hash.moe.token_dispatcher import Experts, LocalDispatcher
from fairseq_hash.parallel.groups import ExpertParallel


class Gate(nn.Module):
    """A router in the form of fairscale's gates: tokens to a loss, combine weights and dispatch mask.

    Args:
        route: a router and its plan on this rank: tokens `[T, D]` to an assignment, and the plan that a rank with all
            experts would make of it.
        group: the ranks whose buffers have to be of one size; None for all ranks.
    """

    def __init__(
        self, route: Callable[[Tensor], tuple[Assignment, DispatchPlan]], group: "dist.ProcessGroup | None" = None
    ) -> None:
        super().__init__()
        self.route = route
        self.group = group

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return no loss (the criterion adds losses), combine weights `[T, E, C]`, dispatch mask (bool, the same)."""
        assignment, plan = self.route(x_TD)
        rows_E = plan.sizes.on(x_TD.device)
        # The largest load of all ranks; at least one row, because `MOELayer` cannot handle empty buffers.
        most = rows_E.max().clamp(min=1)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        shape_TEC = (len(x_TD), len(rows_E), int(most))
        expert_R = torch.arange(len(rows_E), device=x_TD.device).repeat_interleave(rows_E)
        first_R = (rows_E.cumsum(0) - rows_E)[expert_R]
        place_R = torch.arange(len(expert_R), device=x_TD.device) - first_R
        where = (plan.choice_R // plan.shape_TK[1], expert_R, place_R)
        if assignment.weight_TK is None:
            weight_R = x_TD.new_ones(len(expert_R))
        else:
            weight_R = assignment.weight_TK.flatten()[plan.choice_R].to(x_TD.dtype)
        mask_TEC = torch.zeros(shape_TEC, dtype=torch.bool, device=x_TD.device)
        mask_TEC = mask_TEC.index_put(where, torch.ones_like(expert_R, dtype=torch.bool))
        weight_TEC = x_TD.new_zeros(shape_TEC).index_put(where, weight_R)
        return x_TD.new_zeros(()), weight_TEC, mask_TEC


class _ByRank(nn.Module):
    """A gate as `MOELayer` needs it where one module holds all experts of a rank: E x C as P x eC."""

    def __init__(self, gate: Gate, size: int) -> None:
        super().__init__()
        self.gate = gate
        self.size = size

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, weight_TEC, mask_TEC = self.gate(x_TD)
        shape = (len(x_TD), self.size, weight_TEC.shape[1] * weight_TEC.shape[2] // self.size)
        return loss, weight_TEC.view(shape), mask_TEC.view(shape)


class _ExpertsOfRank(nn.Module):
    """This rank's experts as one of `MOELayer`'s: rows by sender to rows by expert, and back."""

    def __init__(self, experts: Experts, parallel: ExpertParallel) -> None:
        super().__init__()
        self.experts = experts
        self.shape_Pe = (parallel.size, parallel.local_experts)

    def forward(self, rows: Tensor) -> Tensor:
        size, local = self.shape_Pe
        rows_ePCD = rows.view(size, local, -1, rows.shape[-1]).transpose(0, 1)
        rows_RD = rows_ePCD.reshape(-1, rows.shape[-1])
        out_RD = self.experts(rows_RD, (len(rows_RD) // local,) * local)
        return out_RD.view(rows_ePCD.shape).transpose(0, 1).reshape(rows.shape)


class FairscaleDispatcher(LocalDispatcher):
    """Ranks that share experts exchange full capacity buffers, by fairscale's `MOELayer`.

    The layer holds nothing but what it is given: it is made anew each time, and the model's parameters keep their
    names.
    """

    is_fp32_only = True  # fairscale's masks are
    is_metered = False  # fairscale exchanges

    def run(self, x_TD: Tensor, assignment: Assignment, plan: DispatchPlan, experts: Experts) -> Tensor:
        """Return what the experts add to each token; `x_TD` has to be fp32."""
        from fairscale.nn import MOELayer  # here, because few need it, and torch warns of what fairscale imports

        gate = _ByRank(Gate(lambda _: (assignment, plan), self.parallel.group), self.parallel.size)
        layer = MOELayer(gate, _ExpertsOfRank(experts, self.parallel), self.parallel.group)
        return layer(x_TD.unsqueeze(1)).squeeze(1)
