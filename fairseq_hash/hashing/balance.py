"""How evenly a hash table loads its experts, and a bound that no table can beat.

An expert's load is the number of tokens of a text that it serves. With N tokens, E experts and K experts per token the
mean load is K N / E. With perfect balance the largest load equals it.

`num_experts` is E, `columns` K, at most E; `counts`, `[H]`, say how often each key occurs in the text.

Shape suffixes: see `moe.losses`; H is the number of keys, a table's rows.
"""

import math
from dataclasses import dataclass

import numpy as np

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing.mixing import Integers

FAR = 2


@dataclass(frozen=True, eq=False)
class Balance:
    """The loads of a table's experts on the counts of a text.

    Attributes:
        load_E: int64 `[E]`, the tokens that each expert serves; with MultiHash the sum over the hash functions.
        bound: the smallest largest load that any table for these keys can have, as far as is proven (`lower_bound`).
        overloading: int64, the keys whose count alone exceeds the mean load, by descending count. If there is one, no
            table for these keys is balanced.
        overloading_counts: their counts.
    """

    load_E: np.ndarray
    bound: int
    overloading: np.ndarray
    overloading_counts: np.ndarray

    @property
    def mean(self) -> float:
        """The mean load, K N / E."""
        return float(self.load_E.mean())

    @property
    def largest_over_mean(self) -> float:
        """The largest load over the mean: 1 is perfect."""
        return int(self.load_E.max()) / self.mean

    @property
    def smallest_over_mean(self) -> float:
        """The smallest load over the mean: 1 is perfect, 0 is an expert without tokens."""
        return int(self.load_E.min()) / self.mean

    @property
    def bound_over_mean(self) -> float:
        """A lower bound of `largest_over_mean` for any table on these keys."""
        return self.bound / self.mean

    @property
    def coefficient_of_variation(self) -> float:
        """The standard deviation of the loads divided by their mean: 0 is perfect."""
        return float(self.load_E.std()) / self.mean

    @property
    def entropy(self) -> float:
        """The entropy of the loads' shares in nats: log E is perfect."""
        share_E = self.load_E[self.load_E > 0] / self.load_E.sum()
        return float(-(share_E * np.log(share_E)).sum()) + 0.0  # no negative zero

    @property
    def entropy_share(self) -> float:
        """The entropy divided by log E: 1 is perfect."""
        return self.entropy / math.log(len(self.load_E)) if len(self.load_E) > 1 else 1.0


def complaint(balance: Balance) -> "str | None":
    """Return what is wrong with the loads, in words; None if all experts have tokens and none has far too many.

    "Far too many" means more than `FAR` times the proven lower bound of the largest load for these keys.
    """
    parts = []
    if idle := int((balance.load_E == 0).sum()):
        parts.append(f"{idle:,} of {len(balance.load_E):,} experts get no token")
    largest, bound = balance.largest_over_mean, balance.bound_over_mean
    if largest > FAR * bound:
        parts.append(f"the largest load is {largest:.2f} times the mean, and a table could have {bound:.2f}")
    return "; ".join(parts) or None


def judge(expert_HK: np.ndarray, counts: Integers, num_experts: int, is_multi_hash: bool = False) -> Balance:
    """Return the balance of a table.

    A MultiHash table with H keys and K hash functions has the loads of a table with one column that lists each key K
    times. So its bound is that of K H keys with one expert each. The bound for distinct experts would not hold, because
    a row may name an expert twice.

    `expert_HK` is int64, its experts from 0 to E - 1. Raises `UserError` if counts and rows differ in number, or if all
    counts are 0.
    """
    count_H = np.asarray(counts, dtype=np.int64)
    columns = expert_HK.shape[1]
    if len(count_H) != len(expert_HK):
        raise UserError(f"{len(count_H)} counts for a hash table of {len(expert_HK)} rows; give one for each row")
    if not count_H.any():
        raise UserError("all counts are 0, so no expert has a load; give the counts of a text with tokens")
    load_E = expert_loads(expert_HK, count_H, num_experts)
    if is_multi_hash:
        bound = lower_bound(np.repeat(count_H, columns), num_experts, 1)
    else:
        bound = lower_bound(count_H, num_experts, columns)
    above = np.flatnonzero(count_H > load_E.mean())
    above = above[np.argsort(-count_H[above], kind="stable")]
    return Balance(load_E, bound, above, count_H[above])


def expert_loads(expert_HK: np.ndarray, counts: Integers, num_experts: int) -> np.ndarray:
    """Return the load of each expert, int64 `[E]`: the counts of the keys that it serves. Exact up to 2^53 tokens."""
    load_E = np.zeros(num_experts)
    for expert_H in expert_HK.T:
        load_E += np.bincount(expert_H, weights=counts, minlength=num_experts)
    return load_E.astype(np.int64)


def lower_bound(counts: Integers, num_experts: int, columns: int = 1) -> int:
    """Return a lower bound of the largest load: in every table some expert has at least this load.

    Proof. Let a table name K distinct experts in each of its rows, K <= E, and let c_1 >= c_2 >= ... be the counts.

    1. The loads sum to K N. The largest is at least their mean, and it is whole: at least ceil(K N / E).
    2. Take any m = 0, 1, 2, ... and the first j = floor(m E / K) + 1 keys. They name K j > m E experts. By the
       pigeonhole principle some expert is named at least m + 1 times, and because no row names it twice, by m + 1
       different keys among these j. Its load is at least the sum of the m + 1 smallest counts among the first j,
       c_{j-m} + ... + c_j. (There are that many: j >= m + 1 because E >= K.)

    m = 0 says that the largest load is at least the largest count. m = 1 says that once E / K keys fill all experts,
    the next key shares an expert with another one. More than j keys would only add smaller counts to the sum.
    """
    count_H = np.sort(np.asarray(counts, dtype=np.int64))[::-1]
    total = np.concatenate([[0], np.cumsum(count_H)])  # of the first 0, 1, ... keys
    mean = -(-columns * int(total[-1]) // num_experts)
    shared = np.arange(len(count_H) * columns // num_experts + 1)  # m
    last = shared * num_experts // columns + 1  # j
    shared, last = shared[last <= len(count_H)], last[last <= len(count_H)]
    return max(mean, int((total[last] - total[last - shared - 1]).max(initial=0)))


def filling_bound(counts: Integers, load_E: np.ndarray, columns: int = 1) -> int:
    """Return a lower bound of the largest load when keys are added to experts that already have loads.

    Proof. Take the first j keys by descending count c_1 >= c_2 >= ... Whichever K distinct experts each key gets,
    expert e gets some number n_e <= j of the keys, the n_e sum to K j, and the load of e grows by at least n_e c_j. If
    no load is above L, then n_e <= floor((L - load_e) / c_j). So L is too small if all min(j, floor((L - load_e) /
    c_j)) sum to less than K j. The result is the largest, over j, of the smallest L that this does not rule out. (Only
    j up to 2 E are tried: later keys are small, and with them the bound comes near the mean load, which is a bound,
    too.)

    `counts` are those of the keys that are added, `load_E`, int64, the loads of all experts without them.
    """
    count_H = np.sort(np.asarray(counts, dtype=np.int64))[::-1]
    bound = max(int(load_E.max()), -(-(int(load_E.sum()) + columns * int(count_H.sum())) // len(load_E)))
    for keys, count in enumerate(count_H[: 2 * len(load_E)].tolist(), start=1):
        if count == 0:
            break
        low, high = bound, int(load_E.max()) + keys * count  # `high` has room for all
        while low < high:
            middle = (low + high) // 2
            if np.minimum(keys, (middle - load_E) // count).sum() < columns * keys:
                low = middle + 1
            else:
                high = middle
        bound = max(bound, low)
    return bound
