"""Dispatch and combine: tokens to rows grouped by expert, and back. It knows neither routers nor experts.

A plan fixes once how the rows lie and travel; it then serves `dispatch` and `combine` of any layers. Where ranks share
the experts, rows go to the rank of their expert and come back (`exchange`). Shape suffixes: see `losses`.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fairseq_hash.moe.all_to_all import Exchange, SplitSizes
from fairseq_hash.moe.kernels.group_sizes import GroupSizes, count_groups
from fairseq_hash.moe.kernels.huge_pages import empty_again
from fairseq_hash.parallel.groups import ExpertParallel


@dataclass(frozen=True)
class DispatchPlan:
    """How T tokens with K choices each become rows grouped by expert.

    Attributes:
        choice_R: int64, the place of each of this rank's rows in the flattened `[T, K]`; by expert, then ascending.
        sizes: how many rows each expert of this rank gets, from all ranks of the group, after dropping; where there is
            no exchange, how many rows of this rank each of all experts gets.
        demand_E: int64, choices of this rank's tokens for each expert, before dropping.
        shape_TK: (T, K).
        exchange: how rows travel between ranks; None where this rank holds all experts, or fairscale moves them.
    """

    choice_R: Tensor
    sizes: GroupSizes
    demand_E: Tensor
    shape_TK: tuple[int, int]
    exchange: "Exchange | None" = None

    @property
    def rows_per_expert(self) -> tuple[int, ...]:
        """`sizes` on the host, which waits for the device."""
        return self.sizes.host

    @property
    def dropped(self) -> int:
        """Number of this rank's choices that exceed their expert's capacity."""
        return self.shape_TK[0] * self.shape_TK[1] - len(self.choice_R)

    @cached_property
    def token_R(self) -> Tensor:
        """int64, the token of each of this rank's rows."""
        choices = self.shape_TK[1]
        return self.choice_R if choices == 1 else self.choice_R // choices

    @cached_property
    def row_C(self) -> "Tensor | None":
        """int64, the row of each choice, the opposite of `choice_R`; None where choices were dropped and have none."""
        if self.dropped:
            return None
        return torch.empty_like(self.choice_R).scatter_(
            0, self.choice_R, torch.arange(len(self.choice_R), device=self.choice_R.device)
        )

    def to_rows(self, x_TD: Tensor) -> Tensor:
        """Return `[R, D]`: each row's token."""
        return _select(x_TD, self.token_R)

    def to_tokens(self, rows_RD: Tensor) -> Tensor:
        """Return `[T, D]`: the sum of each token's rows; zero where it has none.

        Each row has a place of its own, so nothing is accumulated and the result is deterministic on a GPU too.
        """
        tokens, choices = self.shape_TK
        if self.row_C is None:
            y_CD = rows_RD.new_zeros(tokens * choices, rows_RD.shape[1]).index_copy_(0, self.choice_R, rows_RD)
        else:
            y_CD = _select(rows_RD, self.row_C)
        # Under autocast a sum without a dtype is fp32.
        return y_CD if choices == 1 else y_CD.view(tokens, choices, y_CD.shape[1]).sum(dim=1, dtype=y_CD.dtype)


class PlanUnderWay:
    """A plan whose split sizes are still being exchanged; `plan` waits for them, once."""

    def __init__(self, expert_TK: Tensor, parallel: ExpertParallel, capacity_factor: float = 0.0) -> None:
        """Begin the plan for an assignment `expert_TK` (int64, every entry from 0 to E - 1).

        An expert over its capacity keeps the choices that come first in `expert_TK`. The layers flatten `[L, B]` with
        the position first, so whether a token is dropped never depends on later positions: a language model sees no
        future. Capacity is counted over this rank's tokens.
        """
        self.shape_TK = (expert_TK.shape[0], expert_TK.shape[1])
        expert_C = expert_TK.flatten()
        self.demand_E = count_groups(expert_C, parallel.num_experts)
        self.choice_R = expert_C.argsort(stable=True)
        capacity = expert_capacity(len(expert_C), parallel.num_experts, capacity_factor)
        rows_E = self.demand_E
        if capacity is not None:
            rows_E = self.demand_E.clamp(max=capacity)
            start_E = self.demand_E.cumsum(0) - self.demand_E
            rank_R = torch.arange(len(expert_C), device=expert_C.device) - start_E[expert_C[self.choice_R]]
            self.choice_R = self.choice_R[rank_R < capacity]
        exchanges = parallel.is_shared and parallel.dispatch == "all-to-all"
        self.split = SplitSizes(rows_E, parallel) if exchanges else None
        self.sizes = None if exchanges else GroupSizes(rows_E)

    @cached_property
    def plan(self) -> DispatchPlan:
        """The finished plan."""
        exchange, sizes = (None, self.sizes) if self.split is None else self.split.wait()
        return DispatchPlan(self.choice_R, sizes, self.demand_E, self.shape_TK, exchange)


def plan_dispatch(expert_TK: Tensor, parallel: ExpertParallel, capacity_factor: float = 0.0) -> DispatchPlan:
    """Return the plan for an assignment; see `PlanUnderWay`. Every rank of the group has to call this."""
    return PlanUnderWay(expert_TK, parallel, capacity_factor).plan


def expert_capacity(num_choices: int, num_experts: int, capacity_factor: float) -> "int | None":
    """Return the most rows an expert takes: the mean load times `capacity_factor`, rounded up; None without a limit.

    Switch Transformers (Fedus, Zoph, Shazeer 2021), section 2.2, equation 3.
    """
    if capacity_factor == 0:
        return None
    # 1.1 * 10 / 11 is 1.0000000000000002 in floating point, and means 1.
    return math.ceil(round(num_choices * capacity_factor / num_experts, 6))


def dispatch(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Return the rows `[R, D]` for this rank's experts, grouped by expert: each choice's token, from all ranks."""
    rows_RD = _ToRows.apply(x_TD, plan) if torch.is_grad_enabled() else plan.to_rows(x_TD)
    return rows_RD if plan.exchange is None else plan.exchange.there(rows_RD)


def combine(rows_RD: Tensor, plan: DispatchPlan, weight_TK: "Tensor | None") -> Tensor:
    """Return `[T, D]`: the sum of each token's rows, scaled by `weight_TK`; zero where all its rows were dropped."""
    if plan.exchange is not None:
        rows_RD = plan.exchange.back(rows_RD)
    if weight_TK is not None:
        rows_RD = rows_RD * weight_TK.flatten().index_select(0, plan.choice_R).unsqueeze(1).to(rows_RD.dtype)
    return _ToTokens.apply(rows_RD, plan) if torch.is_grad_enabled() else plan.to_tokens(rows_RD)


def _select(value_ND: Tensor, place_M: Tensor) -> Tensor:
    if torch.is_grad_enabled() and value_ND.requires_grad:
        return value_ND.index_select(0, place_M)
    out_MD = empty_again((len(place_M), value_ND.shape[1]), value_ND)
    return torch.index_select(value_ND, 0, place_M, out=out_MD)


class _ToRows(torch.autograd.Function):
    """Tokens to rows. Autograd's gradient of `index_select` would add up row by row what lies in one place each."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        return plan.to_rows(x_TD)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_RD: Tensor) -> tuple[Tensor, None]:
        return ctx.plan.to_tokens(grad_RD), None


class _ToTokens(torch.autograd.Function):
    """Rows to tokens, the opposite way."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows_RD: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        return plan.to_tokens(rows_RD)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_TD: Tensor) -> tuple[Tensor, None]:
        return ctx.plan.to_rows(grad_TD), None
