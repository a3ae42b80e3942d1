"""Distilled tables: each token's most frequent experts under a trained router. Shape suffixes: see `moe.losses`."""

import numpy as np

from fairseq_hash.hashing.builders import check_columns


def distilled_experts(chosen_VE: np.ndarray, count_V: np.ndarray, columns: int = 1) -> np.ndarray:
    """Give each token the K experts that a router chose for it most often; ties go to the lower number.

    A token for which the router chose fewer than K experts, or none because it never occurred, gets the experts with
    the smallest loads among the others. This is done by descending count, as `balanced_experts` does it, and a token
    that never occurred counts as one, so that not all of them go to the same one.

    Args:
        chosen_VE: int64, how often each expert was chosen for each token of the dictionary.
        count_V: int64, how often each token occurred.
        columns: K, 1 to E.

    Returns:
        int64 `[V, K]`.

    Raises:
        UserError: if K is not from 1 to E.
    """
    num_experts = chosen_VE.shape[1]
    check_columns(num_experts, columns)
    expert_VK = np.argsort(-chosen_VE, axis=1, kind="stable")[:, :columns]
    is_chosen_VK = np.take_along_axis(chosen_VE, expert_VK, axis=1) > 0
    weight_V = np.maximum(count_V, 1)
    load_E = np.zeros(num_experts, dtype=np.int64)
    np.add.at(load_E, expert_VK[is_chosen_VK], np.broadcast_to(weight_V[:, None], expert_VK.shape)[is_chosen_VK])
    lacking = np.flatnonzero(~is_chosen_VK.all(axis=1))
    for token in lacking[np.argsort(-weight_V[lacking], kind="stable")].tolist():
        chosen = int(is_chosen_VK[token].sum())
        load = load_E.copy()
        load[expert_VK[token, :chosen]] = np.iinfo(np.int64).max
        added = np.argsort(load, kind="stable")[: columns - chosen]
        expert_VK[token, chosen:] = added
        load_E[added] += weight_V[token]
    return expert_VK


def share_of_choices(chosen_VE: np.ndarray, expert_VK: np.ndarray) -> float:
    """Return the share of a router's choices that a table has: 1 if each token always went where the table sends it."""
    return float(np.take_along_axis(chosen_VE, expert_VK, axis=1).sum() / chosen_VE.sum())
