"""Dispatch and combine: tokens to rows grouped by expert, and back. It knows neither routers nor experts.

A plan fixes once how the rows lie and travel; it then serves `dispatch` and `combine` of any layers. Where ranks share
the experts, rows go to the rank of their expert and come back (`exchange`). Shape suffixes: see `losses`.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fairseq_hash.exchange import Exchange, SplitSizes
from fairseq_hash.parallel import ExpertParallel


@dataclass(frozen=True)
class DispatchPlan:
    """How T tokens with K choices each become rows grouped by expert.

    Attributes:
        choice_R: int64, the place of each of this rank's rows in the flattened `[T, K]`; by expert, then ascending.
        rows_per_expert: how many rows each expert of this rank gets, from all ranks of the group, after dropping; where
            there is no exchange, how many rows of this rank each of all experts gets.
        demand_E: int64, choices of this rank's tokens for each expert, before dropping.
        shape_TK: (T, K).
        exchange: how rows travel between ranks; None where this rank holds all experts, or fairscale moves them.
    """

    choice_R: Tensor
    rows_per_expert: tuple[int, ...]
    demand_E: Tensor
    shape_TK: tuple[int, int]
    exchange: "Exchange | None" = None

    @property
    def dropped(self) -> int:
        """Number of this rank's choices that exceed their expert's capacity."""
        return self.shape_TK[0] * self.shape_TK[1] - len(self.choice_R)


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
        # Not bincount: on a GPU it waits for the device.
        self.demand_E = expert_C.new_zeros(parallel.num_experts).scatter_add_(0, expert_C, torch.ones_like(expert_C))
        self.choice_R = expert_C.argsort(stable=True)
        capacity = expert_capacity(len(expert_C), parallel.num_experts, capacity_factor)
        self.rows_E = self.demand_E
        if capacity is not None:
            self.rows_E = self.demand_E.clamp(max=capacity)
            start_E = self.demand_E.cumsum(0) - self.demand_E
            rank_R = torch.arange(len(expert_C), device=expert_C.device) - start_E[expert_C[self.choice_R]]
            self.choice_R = self.choice_R[rank_R < capacity]
        exchanges = parallel.is_shared and parallel.dispatch == "all-to-all"
        self.sizes = SplitSizes(self.rows_E, parallel) if exchanges else None

    @cached_property
    def plan(self) -> DispatchPlan:
        """The finished plan."""
        exchange, rows_per_expert = (None, tuple(self.rows_E.tolist())) if self.sizes is None else self.sizes.wait()
        return DispatchPlan(self.choice_R, rows_per_expert, self.demand_E, self.shape_TK, exchange)


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
    tokens, choices = plan.shape_TK
    if choices > 1:
        x_TD = x_TD.unsqueeze(1).expand(tokens, choices, -1).reshape(tokens * choices, x_TD.shape[1])
    rows_RD = x_TD.index_select(0, plan.choice_R)
    return rows_RD if plan.exchange is None else plan.exchange.there(rows_RD)


def combine(rows_RD: Tensor, plan: DispatchPlan, weight_TK: "Tensor | None") -> Tensor:
    """Return `[T, D]`: the sum of each token's rows, scaled by `weight_TK`; zero where all its rows were dropped."""
    tokens, choices = plan.shape_TK
    if plan.exchange is not None:
        rows_RD = plan.exchange.back(rows_RD)
    if weight_TK is not None:
        rows_RD = rows_RD * weight_TK.flatten().index_select(0, plan.choice_R).unsqueeze(1).to(rows_RD.dtype)
    # Each row has a place of its own, so nothing is accumulated and the result is deterministic on a GPU too.
    y_CD = rows_RD.new_zeros(tokens * choices, rows_RD.shape[1]).index_copy(0, plan.choice_R, rows_RD)
    return y_CD if choices == 1 else y_CD.view(tokens, choices, y_CD.shape[1]).sum(dim=1)
