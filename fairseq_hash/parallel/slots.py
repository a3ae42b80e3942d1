"""The slots of experts: where the rows of each expert lie, and how they are divided where it has several copies.

Each rank of a group holds the experts of as many slots as any other. An expert that stands in several slots, on as many
ranks, has copies. Every sender cuts its rows of that expert into as many equal parts, one for each copy. Which copy
gets a row left over depends on the sender, so that no copy gets all of them.

Shape suffixes: see `moe.losses`; S is the number of slots, R that of rows.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Slots:
    """What each slot gets of the rows of one sender.

    Attributes:
        expert_S: int64, the expert in each slot.
        copies_S: int64, how many slots have that expert.
        part_S: int64, which part of the sender's rows of its expert goes to each slot, from 0 to copies - 1.
    """

    expert_S: Tensor
    copies_S: Tensor
    part_S: Tensor

    def rows(self, rows_E: Tensor) -> Tensor:
        """Return the rows of each slot, int64 `[..., S]`, where the sender has `rows_E` (int64) of each expert."""
        rows_S = rows_E.index_select(-1, self.expert_S)
        return rows_S // self.copies_S + (self.part_S < rows_S % self.copies_S)

    def by_slot(self, rows_E: Tensor, choice_R: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of each slot, `[S]`, and the sender's choices in the order of slots; they come by expert."""
        rows_S = self.rows(rows_E)
        of_expert_S = rows_E.index_select(0, self.expert_S)
        first_S = (rows_E.cumsum(0) - rows_E).index_select(0, self.expert_S)
        first_S = first_S + self.part_S * (of_expert_S // self.copies_S)
        first_S = first_S + torch.minimum(self.part_S, of_expert_S % self.copies_S)
        shift_S = first_S - (rows_S.cumsum(0) - rows_S)
        shift_R = shift_S.repeat_interleave(rows_S, output_size=len(choice_R))
        place_R = torch.arange(len(choice_R), device=choice_R.device) + shift_R
        return rows_S, choice_R.index_select(0, place_R)


@functools.lru_cache
def slots_of(order: tuple[int, ...], sender: int, device: torch.device) -> Slots:
    """Return the slots for the rows of one sender, its place in the group; `order` is the expert in each slot."""
    met: dict[int, int] = {}
    number_S = []
    for expert in order:
        number_S.append(met.get(expert, 0))
        met[expert] = number_S[-1] + 1
    copies_S = [met[expert] for expert in order]
    part_S = [(number + sender) % copies for number, copies in zip(number_S, copies_S, strict=True)]
    return Slots(*(torch.tensor(values, device=device) for values in (order, copies_S, part_S)))


@functools.lru_cache
def copies_of(order: tuple[int, ...], size: int) -> dict[int, tuple[int, ...]]:
    """Return the places, ascending, of each expert that several of the `size` ranks of a group hold."""
    places: dict[int, list[int]] = {}
    for slot, expert in enumerate(order):
        places.setdefault(expert, []).append(slot * size // len(order))
    return {expert: tuple(held) for expert, held in places.items() if len(held) > 1}
