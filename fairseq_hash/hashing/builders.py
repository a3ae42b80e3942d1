"""Builders of experts `[H, K]` for H keys: pure functions, with the same result for a seed on every machine.

Shape suffixes: see `losses`; H is the number of keys, a table's rows.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fairseq_hash.errors import UserError
from fairseq_hash.hashing.mixing import draws


def random_experts(num_keys: int, num_experts: int, columns: int = 1, seed: int = 42) -> Tensor:
    """Draw K distinct experts for every key, each set of K with the same chance.

    Hash Layers (Roller et al. 2021), section 3, random hash. A draw is a hash of seed and key (`mixing`).

    Args:
        num_keys: H.
        num_experts: E.
        columns: K.
        seed: 0 or more.
    """
    expert_HK = np.empty((num_keys, columns), dtype=np.int64)
    for column in range(columns):
        # One of the experts that the row does not have yet, by its place among them.
        expert_H = (draws(seed, num_keys, column) % np.uint64(num_experts - column)).astype(np.int64)
        for taken_H in np.sort(expert_HK[:, :column], axis=1).T:
            expert_H += expert_H >= taken_H
        expert_HK[:, column] = expert_H
    return torch.from_numpy(expert_HK)


def balanced_experts(counts: Sequence[int], num_experts: int, columns: int = 1, seed: "int | None" = None) -> Tensor:
    """Give the keys, by descending count, each to the K experts with the smallest loads so far.

    Hash Layers (Roller et al. 2021), section 3, balanced hash; K > 1 as in kexue.fm 11750. Ties go to the expert with
    fewer keys, then to the lower one; keys of one count keep their order.

    Args:
        counts: how often each key occurs in the training text, `[H]`.
        num_experts: E.
        columns: K.
    """
    count_H = check_counts(counts)
    emptiest = [(0, 0, expert) for expert in range(num_experts)]  # (load, keys, expert): a heap
    expert_HK = np.empty((len(count_H), columns), dtype=np.int64)
    for key in np.argsort(-count_H, kind="stable").tolist():
        chosen = [heapq.heappop(emptiest) for _ in range(columns)]
        for column, (load, keys, expert) in enumerate(chosen):
            expert_HK[key, column] = expert
            heapq.heappush(emptiest, (load + int(count_H[key]), keys + 1, expert))
    return torch.from_numpy(expert_HK)


def check_counts(counts: Sequence[int]) -> np.ndarray:
    """Return counts as int64; raise `UserError` where they carry no information (none above 1) or one is negative."""
    count_H = np.asarray(counts, dtype=np.int64)
    if count_H.size and count_H.min() < 0:
        raise UserError(f"a count is {count_H.min()}; a count of 0 or more is needed for each key")
    if not count_H.size or count_H.max() <= 1:
        raise UserError(
            "the dictionary has no token counts (none is above 1), and --hash-table balanced needs them; "
            "use a dict.txt that fairseq-preprocess made from the training text, or --hash-table random"
        )
    return count_H


def modulo_experts(num_keys: int, num_experts: int, columns: int = 1) -> Tensor:
    """Give key h the experts (h + k) mod E."""
    return (torch.arange(num_keys).unsqueeze(1) + torch.arange(columns)) % num_experts


def round_robin_experts(num_keys: int, num_experts: int, columns: int = 1) -> Tensor:
    """Deal the experts out in turn: key h has the experts (h K + k) mod E."""
    return torch.arange(num_keys * columns).view(num_keys, columns) % num_experts
