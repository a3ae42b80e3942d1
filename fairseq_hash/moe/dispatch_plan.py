"""The plan of a dispatch: how tokens become rows grouped by expert, and back. Shape suffixes: see `losses`.

It is made once, and serves `dispatch` and `combine` of every layer that takes the same route.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fairseq_hash.moe.kernels.group_sizes import GroupSizes, count_groups
from fairseq_hash.moe.kernels.huge_pages import empty_again
from fairseq_hash.parallel.slots import Slots


class Exchange(Protocol):
    """How rows travel between the ranks that share experts."""

    def there(self, rows_RD: Tensor) -> Tensor:
        """Return the rows that this rank's experts get."""

    def back(self, rows_RD: Tensor) -> Tensor:
        """Return the rows that this rank had sent."""


class SplitSizes(Protocol):
    """The sizes of an exchange that are still on their way."""

    def wait(self) -> "tuple[Exchange, GroupSizes]":
        """Return the exchange, and how many rows each of this rank's experts gets."""


@dataclass(frozen=True)
class DispatchPlan:
    """How T tokens with K choices each become rows grouped by expert.

    Attributes:
        choice_R: int64, the place of each of this rank's rows in the flattened `[T, K]`; by slot, then in the order in
            which the expert takes them.
        sizes: how many rows each expert of this rank gets, from all ranks of the group, after dropping; where there is
            no exchange, how many rows of this rank each of all experts gets. By slot.
        tokens_per_expert_E: int64, choices of this rank's tokens for each expert, before dropping. By id.
        shape_TK: (T, K).
        exchange: how rows travel between ranks; None where this rank holds all experts, or fairscale moves them.
        left_out: how many places of the flattened `[T, K]` are no choices.
    """

    choice_R: Tensor
    sizes: GroupSizes
    tokens_per_expert_E: Tensor
    shape_TK: tuple[int, int]
    exchange: "Exchange | None" = None
    left_out: int = 0

    @property
    def rows_per_expert(self) -> tuple[int, ...]:
        """`sizes` on the host, which waits for the device."""
        return self.sizes.host

    @property
    def dropped(self) -> int:
        """Number of this rank's choices that exceed their expert's capacity."""
        return math.prod(self.shape_TK) - self.left_out - len(self.choice_R)

    @cached_property
    def token_R(self) -> Tensor:
        """int64, the token of each of this rank's rows."""
        choices = self.shape_TK[1]
        return self.choice_R if choices == 1 else self.choice_R // choices

    @cached_property
    def row_C(self) -> "Tensor | None":
        """int64, the row of each choice, the opposite of `choice_R`; None where a place of `[T, K]` has none."""
        if len(self.choice_R) < math.prod(self.shape_TK):
            return None
        return torch.empty_like(self.choice_R).scatter_(
            0, self.choice_R, torch.arange(len(self.choice_R), device=self.choice_R.device)
        )

    def over_kept(self, weight_TK: Tensor) -> Tensor:
        """Return the weights of each token's choices that have a row, divided by their sum; zero for the others."""
        kept_C = torch.zeros_like(weight_TK).flatten().index_fill_(0, self.choice_R, 1)
        weight_TK = weight_TK * kept_C.view(self.shape_TK)
        return weight_TK / weight_TK.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weight_TK.dtype).eps)

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

    def __init__(
        self,
        expert_TK: Tensor,
        num_experts: int,
        capacity_factor: float = 0.0,
        exchange_sizes: "Callable[[Tensor], SplitSizes] | None" = None,
        order_C: "Tensor | None" = None,
        slots: "Slots | None" = None,
    ) -> None:
        """Begin the plan for an assignment.

        An expert over its capacity keeps the choices that come first in `expert_TK`. The layers flatten `[L, B]` with
        the position first, so whether a token is dropped never depends on later positions: a language model sees no
        future. `order_C` is another order. Capacity is counted over this rank's tokens.

        Args:
            expert_TK: int64, every choice from 0 to E - 1.
            num_experts: E.
            capacity_factor: see `expert_capacity`.
            exchange_sizes: what begins to tell other ranks how many rows each slot gets, `[S]`; None: rows stay here.
            order_C: see `Assignment`.
            slots: which rows each slot gets: rows lie by slot. None: slot and id are the same.
        """
        self.shape_TK = (expert_TK.shape[0], expert_TK.shape[1])
        expert_C = expert_TK.flatten()
        if order_C is not None:
            expert_C = expert_C[order_C]
        self.left_out = expert_TK.numel() - len(expert_C)
        self.tokens_per_expert_E = rows_E = count_groups(expert_C, num_experts)
        self.choice_R = expert_C.argsort(stable=True)
        capacity = expert_capacity(expert_TK.numel(), num_experts, capacity_factor)
        if capacity is not None:
            start_E = rows_E.cumsum(0) - rows_E
            rank_R = torch.arange(len(expert_C), device=expert_C.device) - start_E[expert_C[self.choice_R]]
            self.choice_R = self.choice_R[rank_R < capacity]
            rows_E = rows_E.clamp(max=capacity)
        rows_S = rows_E
        if slots is not None:
            rows_S, self.choice_R = slots.by_slot(rows_E, self.choice_R)
        if order_C is not None:
            self.choice_R = order_C[self.choice_R]
        self.sizes: GroupSizes | SplitSizes = GroupSizes(rows_S) if exchange_sizes is None else exchange_sizes(rows_S)

    @cached_property
    def plan(self) -> DispatchPlan:
        """The finished plan."""
        exchange, sizes = (None, self.sizes) if isinstance(self.sizes, GroupSizes) else self.sizes.wait()
        return DispatchPlan(self.choice_R, sizes, self.tokens_per_expert_E, self.shape_TK, exchange, self.left_out)


def expert_capacity(num_choices: int, num_experts: int, capacity_factor: float) -> "int | None":
    """Return the most rows an expert takes: the mean load times `capacity_factor`, rounded up; None without a limit.

    Switch Transformers (Fedus, Zoph, Shazeer 2021), section 2.2, equation 3.
    """
    if capacity_factor == 0:
        return None
    # 1.1 * 10 / 11 is 1.0000000000000002 in floating point, and means 1.
    return math.ceil(round(num_choices * capacity_factor / num_experts, 6))


def random_order(expert_TK: Tensor) -> Tensor:
    """Return the places of the choices in the flattened `[T, K]` (int64), by a random order of their tokens."""
    choice_TK = torch.arange(expert_TK.numel(), device=expert_TK.device).view_as(expert_TK)
    return choice_TK[torch.randperm(len(expert_TK), device=expert_TK.device)].flatten()


def _select(value_ND: Tensor, place_M: Tensor) -> Tensor:
    if torch.is_grad_enabled() and value_ND.requires_grad:
        return value_ND.index_select(0, place_M)
    out_MD = empty_again((len(place_M), value_ND.shape[1]), value_ND)
    return torch.index_select(value_ND, 0, place_M, out=out_MD)
