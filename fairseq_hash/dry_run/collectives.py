"""What the ranks send each other in an update, call by call: counted on real process groups and in a dry run alike."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

c10d = torch.ops.c10d
ALL_TO_ALL, ALL_REDUCE, ALL_GATHER = "all-to-all", "all-reduce", "all-gather"
KINDS = {
    c10d.alltoall_base_.default: ALL_TO_ALL,
    c10d.allreduce_.default: ALL_REDUCE,
    c10d.allgather_.default: ALL_GATHER,
}
SILENT = {c10d.barrier.default, c10d.monitored_barrier_.default}


@dataclass(frozen=True)
class Collective:
    """One call of one rank.

    Attributes:
        kind: all-to-all, all-reduce or all-gather.
        ranks: those of its group, in order.
        rank: this one.
        bytes: of the tensor that it gives: what it reduces, gathers or sends, its own part included.
        sent_P: of an all-to-all, bytes for each rank of the group; else ().
    """

    kind: str
    ranks: tuple[int, ...]
    rank: int
    bytes: int
    sent_P: tuple[int, ...] = ()

    def over_wire(self, ranks_per_node: int) -> tuple[float, float]:
        """Return the bytes that this rank sends inside of its node, and to other nodes.

        An all-to-all sends what it says. An all-reduce of S bytes goes around a ring: each rank sends 2 (n - 1) / n S
        to the next one (reduce-scatter, then all-gather); an all-gather sends (n - 1) S. A ring goes through a node's
        ranks before it leaves the node, and there are rings enough for each rank to be the one that does: the mean over
        the ranks is told.
        """
        n, place = len(self.ranks), self.ranks.index(self.rank)
        node = self.rank // ranks_per_node
        if self.kind == ALL_TO_ALL:
            inside = sum(
                sent
                for rank, sent in zip(self.ranks, self.sent_P, strict=True)
                if rank != self.rank and rank // ranks_per_node == node
            )
            return inside, sum(self.sent_P) - self.sent_P[place] - inside
        total = self.bytes * ((n - 1) if self.kind == ALL_GATHER else 2 * (n - 1) / n)
        nodes = len({rank // ranks_per_node for rank in self.ranks})
        between = total * nodes / n if nodes > 1 else 0.0
        return total - between, between


class CollectiveCounter(TorchDispatchMode):
    """Notes every collective that is called inside, with any backend.

    Attributes:
        calls: in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a collective, and call it."""
        if getattr(func, "namespace", "") == "c10d" and func not in SILENT:
            self.calls.append(_collective(func, args))
        return func(*args, **(kwargs or {}))

    @property
    def bytes(self) -> Counter[str]:
        """Bytes that this rank gave to each kind of collective."""
        total: Counter[str] = Counter()
        for call in self.calls:
            total[call.kind] += call.bytes
        return total


def _collective(func: Any, args: Any) -> Collective:
    if func not in KINDS:
        raise NotImplementedError(f"{func} is a collective that is not counted here")
    kind = KINDS[func]
    boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
    group = dist.ProcessGroup.unbox(boxed)
    ranks = tuple(dist.get_process_group_ranks(group))
    rank = dist.get_rank()
    given = args[0] if kind == ALL_REDUCE else args[1]
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if kind != ALL_TO_ALL:
        return Collective(kind, ranks, rank, size)
    (sent,), splits = tensors, args[4]
    row = size // len(sent) if len(sent) else 0
    rows_P = splits or [len(sent) // len(ranks)] * len(ranks)
    return Collective(kind, ranks, rank, size, tuple(rows * row for rows in rows_P))
