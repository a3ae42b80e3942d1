"""Expert parallelism: which rank holds which experts.

The W ranks of a job form W / P groups of P consecutive ranks (P is `--expert-parallel-size`). In each group every rank
holds E / P experts and serves the tokens of the whole group with them: consecutive ones, or those that a placement puts
there. The ranks at one place of all groups hold the same experts: they are replicas.

Experts have ids, under which all else knows them, and slots, of which each rank holds the next S / P: rows travel by
slot. There are E slots, and with `--expert-replicas` more: an expert may then stand on several ranks of a group, which
hold its copies.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fairseq_hash.core.errors import UserError
from fairseq_hash.parallel.exchange_meter import ExchangeMeter
from fairseq_hash.parallel.slots import Slots, copies_of, slots_of

MOST_PLACES = 8  # that a line of the log names
MOST_RUNS = 3  # of consecutive experts of a rank that it names


@dataclass
class Traffic:
    """What this rank sent to other ranks; what stays on the rank is not counted.

    Attributes:
        rows: rows sent, in all directions: dispatch and combine, forward and backward.
        bytes: rows x width x element size.
        split_exchanges: how often split sizes were exchanged.
        meter: of the layer that runs now, if it is measured. What it exchanges, backward too, counts there as well.
    """

    rows: int = 0
    bytes: int = 0
    split_exchanges: int = 0
    meter: "ExchangeMeter | None" = None


@dataclass(frozen=True)
class ExpertParallel:
    """One rank's place among those that share the experts.

    Attributes:
        num_experts: E, of each sparse layer.
        size: P, ranks of a group; 1 where every rank holds all experts.
        rank: this rank among all ranks.
        world_size: W, all ranks.
        group: the process group of this rank's group; None where P = 1.
        replicas: the process group of the ranks with the same experts; None where there is no other.
        order: the id of the expert in each slot, ascending within each rank; one may stand on several ranks. None: slot
            and id are the same.
        traffic: what this rank has sent so far by our own exchange.
    """

    num_experts: int
    size: int = 1
    rank: int = 0
    world_size: int = 1
    group: "dist.ProcessGroup | None" = None
    replicas: "dist.ProcessGroup | None" = None
    order: "tuple[int, ...] | None" = None
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    @property
    def is_shared(self) -> bool:
        """Whether other ranks hold experts that this one does not."""
        return self.size > 1

    @property
    def place(self) -> int:
        """This rank's place in its group, from 0 to P - 1."""
        return self.rank % self.size

    @property
    def local_experts(self) -> int:
        """e, the number of experts that each rank holds."""
        return (self.num_experts if self.order is None else len(self.order)) // self.size

    @property
    def num_replicas(self) -> int:
        """How many slots a group has beside one for each expert."""
        return self.local_experts * self.size - self.num_experts

    @property
    def copies(self) -> Mapping[int, tuple[int, ...]]:
        """The places, ascending, of each expert that several ranks of a group hold."""
        return copies_of(self.order, self.size) if self.order is not None and self.num_replicas else {}

    @property
    def expert_ids(self) -> Sequence[int]:
        """The experts that this rank holds, ascending."""
        return self.experts_at(self.place)

    @property
    def first_experts(self) -> Sequence[int]:
        """Those of `expert_ids` that no rank before this one in its group holds: all ranks together have each once."""
        copies = self.copies
        if not copies:
            return self.expert_ids
        return [expert for expert in self.expert_ids if copies.get(expert, (self.place,))[0] == self.place]

    @property
    def saved_experts(self) -> Sequence[int]:
        """The experts that this rank writes to a checkpoint: its share of the first ones of it and its replicas."""
        held = self.first_experts
        replicas, replica = self.world_size // self.size, self.rank // self.size
        first, end = (len(held) * share // replicas for share in (replica, replica + 1))
        return held[first:end]

    def experts_at(self, place: int) -> Sequence[int]:
        """Return the experts of the rank at a place in a group, ascending."""
        slots = slice(place * self.local_experts, (place + 1) * self.local_experts)
        return (range(self.num_experts) if self.order is None else self.order)[slots]

    def placed(self, order: Sequence[int]) -> "ExpertParallel":
        """Return the same with the experts in other slots, or in more of them."""
        return replace(self, order=None if list(order) == list(range(self.num_experts)) else tuple(order))

    def slots(self, device: torch.device) -> "Slots | None":
        """Return how this rank's rows are divided among the slots; None where slot and id are the same."""
        return None if self.order is None else slots_of(self.order, self.place, device)

    def slot_of_expert(self, device: torch.device) -> "Tensor | None":
        """Return the slot of each expert, int64 `[E]`; None where it is the expert's id. No expert has copies."""
        return None if self.order is None else _slot_of_expert(self.order, device)

    def in_segments(self, segments: int) -> "ExpertParallel":
        """Return the same with E x `segments` groups of rows, those of each expert beside one another."""
        if segments == 1:
            return self
        order = self.order
        if order is not None:
            order = tuple(expert * segments + segment for expert in order for segment in range(segments))
        return replace(self, num_experts=self.num_experts * segments, order=order)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertParallel":
        """Return the same object: process groups cannot be copied, and a copied model has the same place."""
        return self

    def describe(self) -> str:
        """Return who holds what, for the log."""
        if not self.is_shared:
            return f"every rank of {self.world_size} holds all {self.num_experts} experts"
        places = [
            f"rank {_ranges(range(place, self.world_size, self.size))}: {_named(self.experts_at(place))}"
            for place in range(self.size)
        ]
        if len(places) > MOST_PLACES:
            places = [*places[: MOST_PLACES - 2], "...", places[-1]]
        groups = self.world_size // self.size
        who = f"{self.size} ranks share" if groups == 1 else f"{groups} groups of {self.size} ranks share"
        return f"{who} {self.what()}: {'; '.join(places)}"

    def what(self) -> str:
        """Return how many experts there are, and replicas of them in each group, in words."""
        return f"{self.num_experts} experts" + (f" and {self.num_replicas} replicas" if self.num_replicas else "")


@functools.lru_cache
def _slot_of_expert(order: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(order, device=device).argsort()


def runs_of(ids: Sequence[int]) -> list[range]:
    """Return ascending ids as runs of consecutive ones."""
    runs: list[range] = []
    for one in ids:
        if runs and runs[-1].stop == one:
            runs[-1] = range(runs[-1].start, one + 1)
        else:
            runs.append(range(one, one + 1))
    return runs


def _named(ids: Sequence[int]) -> str:
    """Return at most a few of the ids: 0 to 2, 5, 7, ..."""
    runs = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs_of(ids)]
    return ", ".join([*runs[:MOST_RUNS], *(["..."] if len(runs) > MOST_RUNS else [])])


def _ranges(ranks: range) -> str:
    """Return at most three of many ranks: 0, 8, ... 504."""
    return ", ".join(map(str, ranks)) if len(ranks) <= 3 else f"{ranks[0]}, {ranks[1]}, ... {ranks[-1]}"


def choose_size(num_experts: int, world_size: int, size: int) -> int:
    """Return P: `size`, or for 0 the largest divisor of the world that divides the number of experts.

    Raises:
        UserError: where `size` does not divide both.
    """
    if size == 0:
        return math.gcd(num_experts, world_size)
    if world_size % size or num_experts % size:
        common = math.gcd(num_experts, world_size)
        allowed = [str(n) for n in range(1, common + 1) if common % n == 0]
        raise UserError(
            f"--expert-parallel-size {size} does not divide both the {world_size} ranks and the {num_experts} experts; "
            f"use one of {', '.join(allowed)}, or 0 for the largest"
        )
    return size


def planned(num_experts: int, size: int, rank: int, world_size: int) -> ExpertParallel:
    """Return the place that a rank would have in a world: who holds what, without process groups.

    Raises:
        UserError: if `size` does not divide both the world and E.
    """
    return ExpertParallel(num_experts, choose_size(num_experts, world_size, size), rank, world_size)


def expert_parallel(num_experts: int, size: int) -> ExpertParallel:
    """Return this rank's place, and make its process groups: every rank has to call this, with the same arguments.

    `size` is P, or 0 for the largest that fits.

    Raises:
        UserError: as `planned`.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    place = planned(num_experts, size, rank, world_size)
    if not place.is_shared:
        return place
    size = place.size
    groups = [dist.new_group(list(range(start, start + size))) for start in range(0, world_size, size)]
    replicas = None
    if size < world_size:
        replicas = [dist.new_group(list(range(place, world_size, size))) for place in range(size)][rank % size]
    return replace(place, group=groups[rank // size], replicas=replicas)


class Alone:
    """A process group of this rank only, as fairscale takes one: it calls nothing else of it."""

    def rank(self) -> int:
        """Return the place of this rank."""
        return 0

    def size(self) -> int:
        """Return the number of ranks."""
        return 1


def mark_experts(experts: nn.Module) -> None:
    """Mark the parameters of this rank's experts with an attribute `expert`.

    fairseq leaves parameters that have it (whatever its value) out of legacy_ddp's reduction and of its gradient norm.
    """
    for parameter in experts.parameters():
        parameter.expert = True  # type: ignore[attr-defined]


def expert_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers that are marked as experts'."""
    return [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if hasattr(tensor, "expert")]
