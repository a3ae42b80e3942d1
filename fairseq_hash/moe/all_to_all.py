"""The all-to-all: rows go to the ranks that hold their experts, and come back. Exactly the rows that must move.

Shape suffixes: see `losses`; here also P ranks of a group, e experts of each, and S slots of all.
"""

import contextlib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fairseq_hash.moe.dispatch_plan import PlanUnderWay
from fairseq_hash.moe.kernels.group_sizes import GroupSizes
from fairseq_hash.moe.token_dispatcher import LocalDispatcher
from fairseq_hash.parallel.exchange_meter import ExchangeMeter
from fairseq_hash.parallel.groups import ExpertParallel


@dataclass(frozen=True)
class Exchange:
    """How the rows of one plan travel.

    Attributes:
        parallel: whose experts they are.
        sent_P: rows that this rank sends to each rank of its group, itself included.
        received_P: rows that it gets from each.
        arrival_R: int64, where each row stands among those that arrived, by expert and within it by sender; None where
            rows arrive in that order.
    """

    parallel: ExpertParallel
    sent_P: tuple[int, ...]
    received_P: tuple[int, ...]
    arrival_R: "Tensor | None"

    def there(self, rows_RD: Tensor) -> Tensor:
        """Return the rows that this rank's experts get, grouped by expert; differentiable."""
        return _Transfer.apply(rows_RD, self, True)

    def back(self, rows_RD: Tensor) -> Tensor:
        """Return the rows that this rank had sent, as the experts returned them; differentiable."""
        return _Transfer.apply(rows_RD, self, False)

    def _send(self, rows_RD: Tensor, meter: "ExchangeMeter | None") -> Tensor:
        rows_RD = self._move(rows_RD, self.sent_P, self.received_P, meter)
        return rows_RD if self.arrival_R is None else rows_RD.index_select(0, self.arrival_R)

    def _return(self, rows_RD: Tensor, meter: "ExchangeMeter | None") -> Tensor:
        if self.arrival_R is not None:
            rows_RD = torch.empty_like(rows_RD).index_copy_(0, self.arrival_R, rows_RD)
        return self._move(rows_RD, self.received_P, self.sent_P, meter)

    def _move(
        self, rows_RD: Tensor, sent_P: Sequence[int], received_P: Sequence[int], meter: "ExchangeMeter | None"
    ) -> Tensor:
        leaving = sum(sent_P) - sent_P[self.parallel.place]
        size = leaving * math.prod(rows_RD.shape[1:]) * rows_RD.element_size()
        self.parallel.traffic.rows += leaving
        self.parallel.traffic.bytes += size
        with contextlib.nullcontext() if meter is None else meter.exchange(size, rows_RD.device):
            return all_to_all(rows_RD, sent_P, received_P, self.parallel.group)


class _Transfer(torch.autograd.Function):
    """Rows one way; their gradients the other."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, exchange: Exchange, there: bool) -> Tensor:
        ctx.exchange, ctx.there = exchange, there
        ctx.meter = exchange.parallel.traffic.meter  # of the layer: a plan serves several, and backward is outside
        return (exchange._send if there else exchange._return)(rows_RD, ctx.meter)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> "tuple[Tensor, None, None]":
        return (ctx.exchange._return if ctx.there else ctx.exchange._send)(grad_RD, ctx.meter), None, None


def all_to_all(
    rows_RD: Tensor, sent_P: Sequence[int], received_P: Sequence[int], group: "dist.ProcessGroup | None"
) -> Tensor:
    """Send `sent_P[p]` rows, in their order, to each rank p of the group; return the `received_P` rows sent here."""
    received_RD = rows_RD.new_empty(sum(received_P), *rows_RD.shape[1:])
    dist.all_to_all_single(received_RD, rows_RD.contiguous(), list(received_P), list(sent_P), group=group)
    return received_RD


class SplitSizes:
    """The one exchange of split sizes of a plan, under way: how many rows of each sender each slot gets.

    It starts here and ends in `wait`, so that other work (attention) runs in between.
    """

    def __init__(self, rows_S: Tensor, parallel: ExpertParallel) -> None:
        self.parallel = parallel
        self.sizes_2S = torch.stack([rows_S, torch.empty_like(rows_S)])
        self.work = dist.all_to_all_single(self.sizes_2S[1], self.sizes_2S[0], group=parallel.group, async_op=True)
        parallel.traffic.split_exchanges += 1
        self.copied: torch.cuda.Event | None = None
        if rows_S.is_cuda:
            # On a GPU only the stream waits here. The copy stands in it before all that follows, so `wait` will not
            # wait for what is queued in between.
            self.work.wait()
            self.host_2S = torch.empty(self.sizes_2S.shape, dtype=torch.int64, pin_memory=True)
            self.host_2S.copy_(self.sizes_2S, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def wait(self) -> tuple[Exchange, GroupSizes]:
        """Return the exchange, and how many rows each of this rank's experts gets. The one wait for the device."""
        if self.copied is None:
            self.work.wait()
            self.host_2S = self.sizes_2S
        else:
            self.copied.synchronize()
        size, local = self.parallel.size, self.parallel.local_experts
        sent_Pe, received_Pe = self.host_2S.view(2, size, local)
        rows_per_expert = tuple(received_Pe.sum(dim=0).tolist())
        arrival_R = None
        if local > 1:
            arrival_R = _arrival(self.sizes_2S[1].view(size, local), sum(rows_per_expert))
        sent_P, received_P = (tuple(count_Pe.sum(dim=1).tolist()) for count_Pe in (sent_Pe, received_Pe))
        return Exchange(self.parallel, sent_P, received_P, arrival_R), GroupSizes(rows_per_expert)


def _arrival(count_Pe: Tensor, rows: int) -> Tensor:
    """Return where the rows of expert 0 of senders 0, 1, ..., then those of expert 1, ... stand on arrival.

    Rows arrive by sender and within one by expert, `count_Pe` of them.
    """
    count_S = count_Pe.flatten()
    start_eP = (count_S.cumsum(0) - count_S).view_as(count_Pe).t()
    count_eP = count_Pe.t()
    before_eP = count_eP.flatten().cumsum(0).view_as(count_eP) - count_eP
    shift_S = (start_eP - before_eP).flatten()
    shift_R = shift_S.repeat_interleave(count_eP.flatten(), output_size=rows)
    return torch.arange(rows, device=count_Pe.device) + shift_R


class AllToAllDispatcher(LocalDispatcher):
    """Ranks that share experts exchange exactly the rows that must move."""

    def begin(self, expert_TK: Tensor, capacity_factor: float = 0.0, order_C: "Tensor | None" = None) -> PlanUnderWay:
        """Begin the plan of an assignment: the split sizes travel while other work runs."""
        exchange_sizes = functools.partial(SplitSizes, parallel=self.parallel)
        slots = self.parallel.slots(expert_TK.device)
        return PlanUnderWay(expert_TK, self.parallel.num_experts, capacity_factor, exchange_sizes, order_C, slots)
