"""What a table of another framework is: what breaks it, how it was built, what its layers share.

Shape suffixes: see `moe.losses`; the rows of a foreign table are V token ids, padding of the vocabulary included.
"""

from collections.abc import Mapping
from itertools import combinations

import numpy as np

from fairseq_hash.hashing.balance import judge
from fairseq_hash.hashing.builders import balanced_experts, modulo_experts, random_experts, round_robin_experts

SAME = 0.99  # share of rows that must agree with a builder's: some rows may be of padding or of added tokens
SEEDS = 100  # seeds of our random builder that are tried
FEW = 64  # rows that are compared for each seed
WITHIN = 4  # standard deviations, of the statistic of random draws


def problems(expert_VK: np.ndarray, num_experts: int, symbols: "int | None" = None) -> list[str]:
    """Return what makes a table useless, one line for each kind, with the first row that has it.

    `expert_VK` is int64; `symbols` is the number of symbols of the vocabulary, None if it is not known.
    """
    found = []
    wrong_VK = (expert_VK < 0) | (expert_VK >= num_experts)
    if wrong_VK.any():
        row, column = np.argwhere(wrong_VK)[0].tolist()
        found.append(
            f"{int(wrong_VK.any(axis=1).sum()):,} rows name an expert out of range (row {row}: "
            f"{int(expert_VK[row, column])}; there are experts 0 to {num_experts - 1})"
        )
    sorted_VK = np.sort(expert_VK, axis=1)
    twice_V = (sorted_VK[:, 1:] == sorted_VK[:, :-1]).any(axis=1)
    if twice_V.any():
        row = int(twice_V.argmax())
        found.append(
            f"{int(twice_V.sum()):,} rows name an expert twice (row {row}: {expert_VK[row].tolist()}); the K experts "
            "of a token must differ"
        )
    if symbols is not None and len(expert_VK) < symbols:
        found.append(f"the table has {len(expert_VK):,} rows for {symbols:,} symbols; the last symbols have no experts")
    return found


def same_sets(one_VK: np.ndarray, other_VK: np.ndarray) -> float:
    """Return the share of rows with the same set of experts in two tables of one shape."""
    return float((np.sort(one_VK, axis=1) == np.sort(other_VK, axis=1)).all(axis=1).mean())


def builder_of(expert_VK: np.ndarray, num_experts: int, count_V: "np.ndarray | None" = None) -> str:
    """Return the builder that a table looks like, in words.

    A table is a builder's if `SAME` of its rows have the same sets of experts. Failing that, the loads tell whether it
    balances by the given counts, and the numbers of rows of the experts whether it deals rows out evenly or draws them:
    drawn at random, the numbers of rows have a known variance.

    Args:
        expert_VK: int64, a table without `problems`.
        num_experts: E.
        count_V: int64, how often each token occurs; None if it is not known.
    """
    rows, columns = expert_VK.shape
    known = {
        "modulo: (token id + k) mod E": modulo_experts(rows, num_experts, columns),
        "round-robin: (token id x K + k) mod E": round_robin_experts(rows, num_experts, columns),
    }
    if count_V is not None and count_V.max() > 1:
        known["balanced by these counts"] = balanced_experts(count_V, num_experts, columns)
    first_VK = expert_VK[:FEW]
    for seed in range(SEEDS):
        if same_sets(first_VK, random_experts(len(first_VK), num_experts, columns, seed)) >= SAME:
            known[f"random, seed {seed}, as this package draws it"] = random_experts(rows, num_experts, columns, seed)
    for name, built_VK in known.items():
        if (share := same_sets(expert_VK, built_VK)) >= SAME:
            return f"{name} ({share:.1%} of the rows)"
    if count_V is not None and count_V.any():
        balance = judge(expert_VK, count_V, num_experts)
        if balance.largest_over_mean <= 1.02 * balance.bound_over_mean and balance.smallest_over_mean > 0:
            return "balanced by frequency: these counts load no expert more than 2 % above what is possible"
    rows_E = np.bincount(expert_VK.flatten(), minlength=num_experts)
    if rows_E.max() - rows_E.min() <= 1:
        return "an even deal: all experts have equally many rows"
    # Each expert is in a row with probability K / E; the numbers of rows sum to V K, which costs a degree of freedom.
    share, freedom = columns / num_experts, num_experts - 1
    spread = ((rows_E - rows * share) ** 2).sum() / (rows * share * (1 - share)) * freedom / num_experts
    if abs(spread - freedom) <= WITHIN * (2 * freedom) ** 0.5:
        return "random: the experts' numbers of rows vary as those of random draws"
    return "none of these: made from embeddings, a trained router or other counts"


def overlaps(tables: Mapping[str, np.ndarray], num_experts: int) -> list[str]:
    """Return what each two of a model's tables share, in words, beside what independent random tables would share."""
    lines = []
    for (one, one_VK), (other, other_VK) in combinations(tables.items(), 2):
        if one_VK.shape != other_VK.shape:
            lines.append(f"{one} and {other}: shapes {list(one_VK.shape)} and {list(other_VK.shape)}")
            continue
        columns = one_VK.shape[1]
        shared = sum((one_VK == other_VK[:, [column]]).any(axis=1).mean() for column in range(columns))
        lines.append(
            f"{one} and {other}: {shared:.2f} of {columns} experts of a row are in both (by chance "
            f"{columns**2 / num_experts:.2f}); {same_sets(one_VK, other_VK):.1%} of the rows have the same experts"
        )
    return lines
