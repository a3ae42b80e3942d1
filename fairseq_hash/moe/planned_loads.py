"""What a hash route does to batches, known before a job: rows of each expert and rank, dropped choices, stragglers.

A batch here is what one rank has in a forward pass. The P ranks of a group exchange rows in each, and wait for the rank
with the most: the straggler factor is its rows over the mean of the group. Shape suffixes: see `losses`; N is the
number of batches, P that of the ranks of a group.
"""

from dataclasses import dataclass

import numpy as np
import torch

from fairseq_hash.core.errors import UserError
from fairseq_hash.moe.dispatch_plan import expert_capacity
from fairseq_hash.parallel.groups import ExpertParallel
from fairseq_hash.parallel.placement import rank_loads
from fairseq_hash.parallel.slots import slots_of

AT_ONCE = 1 << 24  # numbers of drawn batches in memory at once


@dataclass(frozen=True, eq=False)
class RoutedBatches:
    """Where the tokens of N batches go by one hash table.

    Attributes:
        choice_NG: int64, how many tokens of each batch chose each group of rows, padding left out.
        segments: groups of each expert, those of one beside one another: the hash functions of MultiHash.
    """

    choice_NG: np.ndarray
    segments: int = 1

    @property
    def load_E(self) -> np.ndarray:
        """The choices of each expert in all batches, int64."""
        return self._of_experts(self.choice_NG.sum(axis=0))

    def kept_NG(self, capacity_factor: float) -> np.ndarray:
        """Return the rows that each group gets of each batch, int64: no more than its capacity, as a rank counts it."""
        if capacity_factor == 0:
            return self.choice_NG
        groups = self.choice_NG.shape[1]
        most_N = [expert_capacity(int(total), groups, capacity_factor) for total in self.choice_NG.sum(axis=1)]
        return np.minimum(self.choice_NG, np.array(most_N)[:, None])

    def dropped_share(self, capacity_factor: float) -> float:
        """Return the share of the choices of all batches that exceed a capacity; one of K choices is 1 / K tokens."""
        return 1 - float(self.kept_NG(capacity_factor).sum() / self.choice_NG.sum())

    def rank_rows(self, parallel: ExpertParallel, capacity_factor: float = 0.0) -> np.ndarray:
        """Return the rows of each rank of a group in each pass, int64 `[N // P, P]`: P batches in turn make a pass.

        They are exact, also where every rank divides its rows of an expert among the copies.

        Raises:
            UserError: if there are fewer batches than ranks.
        """
        size = parallel.size
        passes = len(self.choice_NG) // size
        if not passes:
            raise UserError(
                f"{len(self.choice_NG)} batches are too few for one pass of {size} ranks; give more text or smaller "
                "batches (--batch-tokens)"
            )
        kept_NPG = self.kept_NG(capacity_factor)[: passes * size].reshape(passes, size, -1)
        if (order := parallel.in_segments(self.segments).order) is not None:
            row_NP = np.zeros((passes, size), dtype=np.int64)
            for place in range(size):
                slots = slots_of(order, place, torch.device("cpu"))
                row_NS = slots.rows(torch.from_numpy(kept_NPG[:, place]))
                row_NP += row_NS.view(passes, size, -1).sum(dim=2).numpy()
            return row_NP
        return rank_loads(self._of_experts(kept_NPG.sum(axis=1)), None, size)

    def stragglers(self, parallel: ExpertParallel, capacity_factor: float = 0.0) -> np.ndarray:
        """Return the straggler factor of each pass, float64 `[N // P]`; 1 for a pass without rows."""
        row_NP = self.rank_rows(parallel, capacity_factor)
        mean_N = row_NP.mean(axis=1)
        return np.where(mean_N > 0, row_NP.max(axis=1) / np.maximum(mean_N, 1 / parallel.size), 1.0)

    def _of_experts(self, value_NG: np.ndarray) -> np.ndarray:
        return value_NG.reshape(*value_NG.shape[:-1], -1, self.segments).sum(axis=-1)


def choices(expert_HK: np.ndarray, count_H: np.ndarray, num_experts: int, is_multi_hash: bool) -> np.ndarray:
    """Return how often tokens choose each group of rows, int64 `[G]`, where they look up each row of a table so often.

    `expert_HK` is int64. With MultiHash, expert and hash function make a group, else the expert alone.
    """
    columns = expert_HK.shape[1] if is_multi_hash else 1
    choice_G = np.zeros(num_experts * columns)
    for column, expert_H in enumerate(expert_HK.T):
        group_H = expert_H * columns + (column if is_multi_hash else 0)
        choice_G += np.bincount(group_H, count_H, len(choice_G))
    return choice_G.astype(np.int64)


def drawn_batches(
    expert_HK: np.ndarray,
    count_H: np.ndarray,
    num_experts: int,
    is_multi_hash: bool,
    tokens: int,
    batches: int,
    generator: np.random.Generator,
) -> RoutedBatches:
    """Return batches of so many tokens, each drawn independently of all others by the counts of a table's rows.

    Text varies more: what occurs once soon occurs again. So these stragglers are a lower estimate.
    """
    # Rows with the same experts are drawn as one.
    expert_UK, which_H = np.unique(expert_HK, axis=0, return_inverse=True)
    share_U = np.bincount(which_H.reshape(-1), count_H) / count_H.sum()
    parts = []
    for first in range(0, batches, step := max(1, AT_ONCE // len(share_U))):
        count_NU = generator.multinomial(tokens, share_U, size=min(step, batches - first))
        parts += [choices(expert_UK, count_U, num_experts, is_multi_hash) for count_U in count_NU]
    return RoutedBatches(np.stack(parts), expert_HK.shape[1] if is_multi_hash else 1)
