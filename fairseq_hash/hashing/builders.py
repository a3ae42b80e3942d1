"""Builders of tables `[H, K]` for H keys: pure functions, with the same result for the same seed on every machine.

Every builder takes `num_experts`, E, and `columns`, K; a seed is 0 or more. `counts`, `[H]`, say how often each key
occurs in the training text. A builder returns int64 `[H, K]`. It raises `UserError` if K is not from 1 to E, or if the
counts carry no information.

Shape suffixes: see `moe.losses`; H is the number of keys, a table's rows.
"""

import heapq
from collections.abc import Callable

import numpy as np

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing.balance import expert_loads
from fairseq_hash.hashing.dictionary import SPECIAL
from fairseq_hash.hashing.mixing import Integers, draws

FEWEST_SYMBOLS = 16


def random_experts(num_keys: int, num_experts: int, columns: int = 1, seed: int = 42) -> np.ndarray:
    """Draw K distinct experts for every key; all sets of K are equally probable.

    Hash Layers (Roller et al. 2021), section 3, random hash. A draw is a hash of seed and key (`mixing`).
    """
    check_columns(num_experts, columns)
    expert_HK = np.empty((num_keys, columns), dtype=np.int64)
    for column in range(columns):
        # Draw among the experts that the row does not have yet, by position.
        expert_H = (draws(seed, num_keys, column) % np.uint64(num_experts - column)).astype(np.int64)
        for taken_H in np.sort(expert_HK[:, :column], axis=1).T:
            expert_H += expert_H >= taken_H
        expert_HK[:, column] = expert_H
    return expert_HK


def balanced_experts(counts: Integers, num_experts: int, columns: int = 1, seed: "int | None" = None) -> np.ndarray:
    """Give each key, by descending count, to the K experts with the smallest loads so far.

    Hash Layers (Roller et al. 2021), section 3, balanced hash; K > 1 as in kexue.fm 11750. Ties go to the expert with
    fewer keys, then to the lower number. Keys with the same count keep their order.

    Without a seed, that is the order. A seed gives another balanced table: its order is by counts with noise, and the
    experts are renumbered. Loads are those of the true counts.
    """
    check_columns(num_experts, columns)
    count_H = check_counts(counts)
    if seed is None:
        return greedy_experts(count_H, count_H, np.zeros(num_experts, dtype=np.int64), columns)
    # Factors from 1 to 1.5 mix only keys of similar counts. The rare keys, which even out the loads, still come last.
    # One is added so that keys that never occur are mixed, too. Only sums and products: the same on every machine.
    fraction_H = (draws(seed, len(count_H)) >> np.uint64(11)).astype(np.float64) / 2**53
    expert_HK = greedy_experts(
        count_H, (count_H + 1) * (1 + fraction_H / 2), np.zeros(num_experts, dtype=np.int64), columns
    )
    return np.argsort(draws(seed, num_experts, 1), kind="stable")[expert_HK]


def greedy_experts(count_H: np.ndarray, weight_H: np.ndarray, load_E: np.ndarray, columns: int) -> np.ndarray:
    """Give each key, by descending weight, to the K experts with the smallest loads so far (int64 `[H, K]`).

    `count_H`, int64, is the load that a key adds to its experts. `weight_H` sets the order of the keys; those with the
    same weight keep theirs. `load_E`, int64, are the starting loads, which are not changed.
    """
    emptiest = [(load, 0, expert) for expert, load in enumerate(load_E.tolist())]  # (load, keys, expert): a heap
    heapq.heapify(emptiest)
    expert_HK = np.empty((len(count_H), columns), dtype=np.int64)
    for key in np.argsort(-weight_H, kind="stable").tolist():
        count = int(count_H[key])
        chosen = [heapq.heappop(emptiest) for _ in range(columns)]
        for column, (load, keys, expert) in enumerate(chosen):
            expert_HK[key, column] = expert
            heapq.heappush(emptiest, (load + count, keys + 1, expert))
    return expert_HK


def scattered_experts(counts: Integers, num_experts: int, columns: int = 1, seed: int = 42) -> np.ndarray:
    """Draw 2 K distinct experts for every key.

    By descending count, give each key the K of them with the smallest loads.

    Ours. If K divides E, the K emptiest experts of `balanced_experts` stay together: they form E / K fixed sets, and
    each set acts as one expert K times as wide. Here nearly every key has a set of its own, and the loads are as even.
    Two random choices are nearly as good as all (Mitzenmacher 2001, The power of two choices), and rare keys come last.
    Among equal loads the expert that was drawn first wins.
    """
    check_columns(num_experts, columns)
    count_H = check_counts(counts)
    drawn_HC = random_experts(len(count_H), num_experts, min(num_experts, 2 * columns), seed)
    load_E = np.zeros(num_experts, dtype=np.int64)
    expert_HK = np.empty((len(count_H), columns), dtype=np.int64)
    for key in np.argsort(-count_H, kind="stable").tolist():
        drawn_C = drawn_HC[key]
        chosen = drawn_C[np.argsort(load_E[drawn_C], kind="stable")[:columns]]
        expert_HK[key] = chosen
        load_E[chosen] += count_H[key]
    return expert_HK


def best_of(
    restarts: int, build: Callable[[int], np.ndarray], counts: Integers, num_experts: int
) -> tuple[np.ndarray, int]:
    """Build several tables. Return the one with the smallest largest load, and its number.

    Among equal largest loads the smaller sum of squared loads wins, then the lower number. If `build(0)` is the table
    without restarts, more restarts never make it worse. Several orders are tried, as in kexue.fm 11750.

    `build(n)` makes table n, from 0 to `restarts` - 1.
    """

    def badness(expert_HK: np.ndarray) -> tuple[int, int]:
        loads = expert_loads(expert_HK, counts, num_experts).tolist()
        return max(loads), sum(load * load for load in loads)  # in Python's integers, which do not overflow

    tables = ((number, build(number)) for number in range(restarts))
    number, expert_HK = min(tables, key=lambda table: badness(table[1]))
    return expert_HK, number


def check_counts(counts: Integers) -> np.ndarray:
    """Return counts as int64; raise `UserError` if they carry no information (none above 1) or one is negative."""
    count_H = np.asarray(counts, dtype=np.int64)
    if count_H.size and count_H.min() < 0:
        raise UserError(f"a count is {count_H.min()}; a count of 0 or more is needed for each key")
    if not count_H.size or count_H.max() <= 1:
        raise UserError(
            "the dictionary has no token counts (none is above 1), and --hash-table balanced needs them; "
            "use a dict.txt that fairseq-preprocess made from the training text, or --hash-table random"
        )
    return count_H


def equal_count(counts: Integers) -> "int | None":
    """Return the count of each symbol if a dictionary's counts, `[V]`, are alike for all symbols, else None.

    No text with `FEWEST_SYMBOLS` symbols or more has each of them equally often: such counts were written by hand. The
    four special symbols come first and have no counts in any dictionary; words that pad it count 0. Counts of 1 carry
    no information, which `check_counts` reports.
    """
    own = np.asarray(counts, dtype=np.int64)[len(SPECIAL) :]
    own = own[own > 0]
    return int(own[0]) if len(own) >= FEWEST_SYMBOLS and 1 < own.min() == own.max() else None


def check_columns(num_experts: int, columns: int) -> None:
    """Raise `UserError` unless there are K distinct experts to choose, 1 <= K <= E."""
    if not 1 <= columns <= num_experts:
        raise UserError(f"{columns} distinct experts per token of {num_experts} experts; give 1 to {num_experts}")


def modulo_experts(num_keys: int, num_experts: int, columns: int = 1) -> np.ndarray:
    """Give key h the experts (h + k) mod E: "token id mod" of Expert Choice (Zhou et al. 2022, arXiv 2202.09368)."""
    check_columns(num_experts, columns)
    return (np.arange(num_keys)[:, None] + np.arange(columns)) % num_experts


def round_robin_experts(num_keys: int, num_experts: int, columns: int = 1) -> np.ndarray:
    """Assign the experts in turn: key h has the experts (h K + k) mod E.

    Megatron-LM fills the tables of its DeepSeek-V4 layers like this until real ones are loaded.
    """
    check_columns(num_experts, columns)
    return np.arange(num_keys * columns).reshape(num_keys, columns) % num_experts
