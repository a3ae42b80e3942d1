"""Token dispatchers: they bring tokens to the experts that serve them, and the experts' outputs back.

They know neither routers nor what an expert is. Shape suffixes: see `losses`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.dispatch_plan import DispatchPlan, PlanUnderWay
from fairseq_hash.moe.kernels.group_sizes import GroupSizes
from fairseq_hash.parallel.groups import ExpertParallel

Experts = Callable[[Tensor, "GroupSizes | Sequence[int]"], Tensor]


class LocalDispatcher:
    """Every rank serves its own tokens: it holds all experts. Dispatchers that exchange rows derive from this one.

    Attributes:
        parallel: who shares the experts.
        is_fp32_only: whether it takes tokens in fp32 only.
        is_metered: whether a layer's meter sees what it exchanges.
    """

    is_fp32_only = False
    is_metered = True

    def __init__(self, parallel: ExpertParallel) -> None:
        self.parallel = parallel

    def in_segments(self, segments: int) -> "LocalDispatcher":
        """Return the same for E x `segments` groups of rows, as MultiHash has them."""
        return self if segments == 1 else type(self)(self.parallel.in_segments(segments))

    def begin(self, expert_TK: Tensor, capacity_factor: float = 0.0, order_C: "Tensor | None" = None) -> PlanUnderWay:
        """Begin the plan of an assignment (int64); every rank that shares the experts has to call this."""
        slots = self.parallel.slots(expert_TK.device)
        return PlanUnderWay(expert_TK, self.parallel.num_experts, capacity_factor, order_C=order_C, slots=slots)

    def run(self, x_TD: Tensor, assignment: Assignment, plan: DispatchPlan, experts: Experts) -> Tensor:
        """Return what the experts add to each token, `[T, D]`; zero for a token whose choices were all dropped.

        Every rank that shares the experts has to call this, with any number of tokens (any floating dtype). `experts`
        are this rank's: rows `[R, D]`, grouped by expert, and the groups' sizes, to rows.
        """
        return combine(experts(dispatch(x_TD, plan), plan.sizes), plan, assignment.weight_TK)


TokenDispatcher = LocalDispatcher  # what a sparse layer calls: this one, or one that derives from it


def dispatch(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Return the rows `[R, D]` for this rank's experts, grouped by expert: each choice's token, from all ranks."""
    rows_RD = _Select.apply(x_TD, plan, True) if torch.is_grad_enabled() else plan.to_rows(x_TD)
    return rows_RD if plan.exchange is None else plan.exchange.there(rows_RD)


def combine(rows_RD: Tensor, plan: DispatchPlan, weight_TK: "Tensor | None") -> Tensor:
    """Return `[T, D]`: the sum of each token's rows, scaled by `weight_TK`; zero where all its rows were dropped."""
    if plan.exchange is not None:
        rows_RD = plan.exchange.back(rows_RD)
    if weight_TK is not None:
        rows_RD = rows_RD * weight_TK.flatten().index_select(0, plan.choice_R).unsqueeze(1).to(rows_RD.dtype)
    return _Select.apply(rows_RD, plan, False) if torch.is_grad_enabled() else plan.to_tokens(rows_RD)


class _Select(torch.autograd.Function):
    """Tokens to rows, or rows to tokens; their gradients go the opposite way.

    Autograd's own gradient of `index_select` would add up row by row what lies in one place each.
    """

    @staticmethod
    def forward(ctx: Any, value_ND: Tensor, plan: DispatchPlan, to_rows: bool) -> Tensor:
        ctx.plan, ctx.to_rows = plan, to_rows
        return plan.to_rows(value_ND) if to_rows else plan.to_tokens(value_ND)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        return (ctx.plan.to_tokens if ctx.to_rows else ctx.plan.to_rows)(grad_ND), None, None
