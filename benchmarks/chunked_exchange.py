"""A candidate for the all-to-all: rows travel in chunks, so that the experts work on one chunk while the next one
travels.

It exists for comparison with the package's exchange of all rows at once (`communication.py`), forward only. A chunk has
all rows of some experts of each rank, so each expert's weights are read once and its matrix product stays whole. Shape
suffixes: see `fairseq_hash.moe.losses`; P ranks, e experts per rank, R rows.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fairseq_hash.moe.dispatch_plan import DispatchPlan
from fairseq_hash.parallel.groups import ExpertParallel


@dataclass(frozen=True)
class Chunk:
    """The plan by which the rows of some experts of each rank travel.

    Attributes:
        choice_R: int64, this rank's tokens to send, ordered by rank, then by expert.
        sent_P: rows to each rank.
        received_P: rows from each rank.
        arrival_R: int64, the position of each row among the arrived rows, ordered by expert.
        rows_per_expert: rows of each of this rank's experts, zero for experts of other chunks.
    """

    choice_R: Tensor
    sent_P: list[int]
    received_P: list[int]
    arrival_R: Tensor
    rows_per_expert: list[int]


class ChunkedExchange:
    """Dispatch, experts and combine of one plan in chunks. Every rank must make it, and call it equally often."""

    def __init__(
        self, plan: DispatchPlan, expert_T: Tensor, experts: nn.Module, parallel: ExpertParallel, chunks: int
    ) -> None:
        """Cut a plan without dropped tokens and with one expert per token (`expert_T`) into at most e chunks."""
        self.experts, self.group = experts, parallel.group
        sent_Pe = plan.tokens_per_expert_E.view(parallel.size, parallel.local_experts)
        received_Pe = torch.empty_like(sent_Pe)
        dist.all_to_all_single(received_Pe, sent_Pe, group=parallel.group)
        local_R = expert_T[plan.choice_R] % parallel.local_experts
        cuts = [number * parallel.local_experts // chunks for number in range(chunks + 1)]
        self.chunks = []
        for first, after in itertools.pairwise(cuts):
            own_e = torch.zeros(parallel.local_experts, dtype=torch.bool)
            own_e[first:after] = True
            received_Pc = received_Pe * own_e
            arrived_R = torch.arange(parallel.local_experts).repeat(parallel.size)
            arrived_R = arrived_R.repeat_interleave(received_Pc.flatten())
            sizes = ((sent_Pe * own_e).sum(1).tolist(), received_Pc.sum(1).tolist())
            own_R, arrival_R = plan.choice_R[own_e[local_R]], arrived_R.argsort(stable=True)
            self.chunks.append(Chunk(own_R, *sizes, arrival_R, received_Pc.sum(0).tolist()))

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Return the experts' outputs for the tokens, `[T, D]`."""
        there = [self._send(x_TD, self.chunks[0])]
        back = []
        for number, chunk in enumerate(self.chunks):
            if number + 1 < len(self.chunks):
                there.append(self._send(x_TD, self.chunks[number + 1]))
            rows_RD, under_way, _ = there[number]
            under_way.wait()
            rows_RD = self.experts(rows_RD.index_select(0, chunk.arrival_R), chunk.rows_per_expert)
            rows_RD = torch.empty_like(rows_RD).index_copy_(0, chunk.arrival_R, rows_RD)
            back.append(self._move(rows_RD, chunk.received_P, chunk.sent_P))
        y_TD = torch.zeros_like(x_TD)
        for chunk, (rows_RD, under_way, _) in zip(self.chunks, back, strict=True):
            under_way.wait()
            y_TD.index_copy_(0, chunk.choice_R, rows_RD)
        return y_TD

    def _send(self, x_TD: Tensor, chunk: Chunk) -> "tuple[Tensor, Any, Tensor]":
        return self._move(x_TD.index_select(0, chunk.choice_R), chunk.sent_P, chunk.received_P)

    def _move(self, rows_RD: Tensor, sent_P: Sequence[int], received_P: Sequence[int]) -> "tuple[Tensor, Any, Tensor]":
        """Return the rows that will arrive, the handle to wait for, and the sent rows, which must stay alive until
        then.
        """
        arriving_RD = rows_RD.new_empty(sum(received_P), rows_RD.shape[1])
        sizes = list(received_P), list(sent_P)
        return (
            arriving_RD,
            dist.all_to_all_single(arriving_RD, rows_RD, *sizes, group=self.group, async_op=True),
            rows_RD,
        )
