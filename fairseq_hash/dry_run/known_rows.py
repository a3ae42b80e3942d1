"""Token dispatch where it is known how many rows go to each expert, and the tokens themselves are not.

Shape suffixes: see `moe.losses`; here also P ranks of a group and R rows.
"""

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from fairseq_hash.moe.all_to_all import AllToAllDispatcher, Exchange, all_to_all
from fairseq_hash.moe.dispatch_plan import DispatchPlan, expert_capacity
from fairseq_hash.moe.kernels.group_sizes import GroupSizes, count_groups
from fairseq_hash.parallel.groups import ExpertParallel

RowsOf = Callable[[int, int, int], "list[list[int]]"]
"""What choices each rank of a group has for each expert: of (P, G groups of rows, choices of a rank), `[P][G]`."""


def even_rows(ranks: int, groups: int, choices: int) -> list[list[int]]:
    """Return as many rows for each expert as for any other, from each rank; what is left over goes to the first."""
    share, rest = divmod(choices, groups)
    return [[share + (group < rest) for group in range(groups)]] * ranks


class KnownPlan:
    """A plan of known sizes, by the same steps as `PlanUnderWay`: what is made on the way is made here, too."""

    def __init__(
        self,
        rows: RowsOf,
        expert_TK: Tensor,
        parallel: ExpertParallel,
        capacity_factor: float,
        order_C: "Tensor | None",
    ) -> None:
        """Begin the plan; its sizes are those of `rows`, cut to the capacity."""
        self.parallel = parallel
        self.shape_TK = (expert_TK.shape[0], expert_TK.shape[1])
        expert_C = expert_TK.flatten()
        if order_C is not None:
            expert_C = expert_C[order_C]
        self.left_out = expert_TK.numel() - len(expert_C)
        self.tokens_per_expert_E = count_groups(expert_C, parallel.num_experts)
        choice_R = expert_C.argsort(stable=True)
        rows_PE = rows(parallel.size, parallel.num_experts, len(expert_C))
        capacity = expert_capacity(expert_TK.numel(), parallel.num_experts, capacity_factor)
        if capacity is not None:
            rows_PE = [[min(size, capacity) for size in rows_E] for rows_E in rows_PE]
        own_E = rows_PE[parallel.place]
        if (kept := sum(own_E)) < len(expert_C):
            choice_R = choice_R[:kept].clone()
        self.choice_R = choice_R if order_C is None else order_C[choice_R]
        self.rows_PE = rows_PE
        if parallel.is_shared:
            sizes_2E = self.tokens_per_expert_E.new_empty(2, parallel.num_experts)
            self.sizes_2E = sizes_2E
            self.work = dist.all_to_all_single(sizes_2E[1], sizes_2E[0], group=parallel.group, async_op=True)
            parallel.traffic.split_exchanges += 1

    @functools.cached_property
    def plan(self) -> DispatchPlan:
        """The finished plan."""
        parallel, own_E = self.parallel, self.rows_PE[self.parallel.place]
        if not parallel.is_shared:
            sizes, exchange = GroupSizes(own_E), None
        else:
            ours = parallel.expert_ids
            sent_P = tuple(sum(own_E[expert] for expert in parallel.experts_at(p)) for p in range(parallel.size))
            received_P = tuple(sum(rows_E[expert] for expert in ours) for rows_E in self.rows_PE)
            sizes = GroupSizes([sum(rows_E[expert] for rows_E in self.rows_PE) for expert in ours])
            arrival_R = self.choice_R.new_empty(sum(received_P)) if len(ours) > 1 else None
            exchange = Exchange(parallel, sent_P, received_P, arrival_R)
        return DispatchPlan(self.choice_R, sizes, self.tokens_per_expert_E, self.shape_TK, exchange, self.left_out)


class KnownDispatcher(AllToAllDispatcher):
    """Dispatches by plans of known sizes; everything after the plan is the training's own."""

    def __init__(self, parallel: ExpertParallel, rows: RowsOf) -> None:
        """Dispatch as many rows as `rows` says, plan by plan."""
        super().__init__(parallel)
        self.rows = rows

    def in_segments(self, segments: int) -> "KnownDispatcher":
        """Return the same for E x `segments` groups of rows."""
        return self if segments == 1 else KnownDispatcher(self.parallel.in_segments(segments), self.rows)

    def begin(self, expert_TK: Tensor, capacity_factor: float = 0.0, order_C: "Tensor | None" = None) -> KnownPlan:  # type: ignore[override]
        """Begin the plan of an assignment whose values are not known."""
        return KnownPlan(self.rows, expert_TK, self.parallel, capacity_factor, order_C)


def known_balance(balance: str, parallel: ExpertParallel) -> Callable[[Tensor], Tensor]:
    """Return what stands for BASE's assignment (`moe.distributed_assignment`): its exchange, and no solution.

    On the first rank of a group, and with `shuffle` on any, the scores of others arrive; the time of the solver is not
    in a dry run.
    """

    def assign(score_TE: Tensor) -> Tensor:
        tokens = len(score_TE)
        if balance == "local" or not parallel.is_shared:
            return torch.zeros(tokens, dtype=torch.int64, device=score_TE.device)
        if balance == "shuffle":
            share, rest = divmod(tokens, parallel.size)
            sent_P = [share + (place < rest) for place in range(parallel.size)]
            received_P = [sent_P[parallel.place]] * parallel.size
        else:
            sent_P = [tokens, *[0] * (parallel.size - 1)]
            received_P = [tokens if parallel.place == 0 else 0] * parallel.size
        counts_P = torch.empty(parallel.size, dtype=torch.int64, device=score_TE.device)
        dist.all_to_all_single(torch.empty_like(counts_P), counts_P, group=parallel.group)
        expert_N = all_to_all(score_TE, sent_P, received_P, parallel.group).argmax(dim=1)
        return all_to_all(expert_N, received_P, sent_P, parallel.group)

    return assign
