"""Dispatch and combine: tokens to rows grouped by expert, and back. It knows neither routers nor experts.

`plan_dispatch` fixes once how the rows lie; the frozen plan then serves `dispatch` and `combine` of any layers.
Shape suffixes: see `losses`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DispatchPlan:
    """How T tokens with K choices each become R rows grouped by expert.

    Attributes:
        choice_R: int64, the place of each row's choice in the flattened `[T, K]`; ascending within an expert.
        rows_per_expert: rows of each expert, after dropping; they add up to R.
        demand_E: int64, choices of each expert, before dropping.
        shape_TK: (T, K).
    """

    choice_R: Tensor
    rows_per_expert: tuple[int, ...]
    demand_E: Tensor
    shape_TK: tuple[int, int]

    @property
    def dropped(self) -> int:
        """Number of choices that exceed their expert's capacity."""
        return self.shape_TK[0] * self.shape_TK[1] - len(self.choice_R)


def expert_capacity(num_choices: int, num_experts: int, capacity_factor: float) -> "int | None":
    """Return the most rows an expert takes: the mean load times `capacity_factor`, rounded up; None without a limit.

    Switch Transformers (Fedus, Zoph, Shazeer 2021), section 2.2, equation 3.
    """
    if capacity_factor == 0:
        return None
    # 1.1 * 10 / 11 is 1.0000000000000002 in floating point, and means 1.
    return math.ceil(round(num_choices * capacity_factor / num_experts, 6))


def plan_dispatch(expert_TK: Tensor, num_experts: int, capacity_factor: float = 0.0) -> DispatchPlan:
    """Plan the rows for an assignment `expert_TK` (int64, every entry from 0 to `num_experts` - 1).

    An expert over its capacity keeps the choices that come first in `expert_TK`. The layers flatten `[L, B]` with the
    position first, so whether a token is dropped never depends on later positions: a language model sees no future.
    """
    expert_C = expert_TK.flatten()
    demand_E = torch.bincount(expert_C, minlength=num_experts)
    choice_R = expert_C.argsort(stable=True)
    capacity = expert_capacity(len(expert_C), num_experts, capacity_factor)
    rows_E = demand_E
    if capacity is not None:
        rows_E = demand_E.clamp(max=capacity)
        start_E = demand_E.cumsum(0) - demand_E
        rank_R = torch.arange(len(expert_C), device=expert_C.device) - start_E[expert_C[choice_R]]
        choice_R = choice_R[rank_R < capacity]
    return DispatchPlan(choice_R, tuple(rows_E.tolist()), demand_E, (expert_TK.shape[0], expert_TK.shape[1]))


def dispatch(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Return the rows `[R, D]` of the plan: each choice's token, grouped by expert."""
    tokens, choices = plan.shape_TK
    if choices > 1:
        x_TD = x_TD.unsqueeze(1).expand(tokens, choices, -1).reshape(tokens * choices, -1)
    return x_TD.index_select(0, plan.choice_R)


def combine(rows_RD: Tensor, plan: DispatchPlan, weight_TK: "Tensor | None") -> Tensor:
    """Return `[T, D]`: the sum of each token's rows, scaled by `weight_TK`; zero where all its rows were dropped."""
    tokens, choices = plan.shape_TK
    if weight_TK is not None:
        rows_RD = rows_RD * weight_TK.flatten().index_select(0, plan.choice_R).unsqueeze(1).to(rows_RD.dtype)
    # Each row has a place of its own, so nothing is accumulated and the result is deterministic on a GPU too.
    y_CD = rows_RD.new_zeros(tokens * choices, rows_RD.shape[1]).index_copy(0, plan.choice_R, rows_RD)
    return y_CD if choices == 1 else y_CD.view(tokens, choices, -1).sum(dim=1)
