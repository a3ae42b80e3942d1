"""Clusters of tokens with similar embeddings: one expert each, or spread over the experts.

Hash Layers (Roller et al. 2021), section 3, clustered and dispersed hash: k-means of the embeddings of a trained model.

Arguments, results and errors that are not named are those of `builders`. An embedding is floating point `[H, D]`, the
seed of k-means from 0 to 2^32 - 1.

Shape suffixes: see `moe.losses`; H is the number of keys, a table's rows.
"""

import warnings
from typing import TYPE_CHECKING

import numpy as np

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing.builders import check_columns, check_counts
from fairseq_hash.hashing.mixing import Integers

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4096  # rows at a time, which bounds memory


def cluster_keys(embedding_HD: "Tensor", num_clusters: int, seed: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """Group keys by k-means (scikit-learn's, from one k-means++ start).

    It runs on one thread. Several threads add their sums in the order in which they happen to end, which changes the
    last digits and finally the labels. Another processor or version of the libraries may still round differently, so
    keep a clustered table as a file.

    Returns the cluster of each key, int64 `[H]`, and the clusters' means, float32 `[clusters, D]`. Raises `UserError`
    if there are more clusters than keys or than different rows.
    """
    # Here, because importing hashing must not import scikit-learn.
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    if not 1 <= num_clusters <= len(embedding_HD):
        raise UserError(f"{num_clusters} clusters of {len(embedding_HD)} keys; give 1 to {len(embedding_HD)}")
    means = KMeans(num_clusters, n_init=1, random_state=seed)
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # too few different rows are refused below
        cluster_H = means.fit_predict(embedding_HD.detach().cpu().float().numpy())
    found = len(np.unique(cluster_H))
    if found < num_clusters:
        raise UserError(f"the embedding's rows fall into {found} clusters, not {num_clusters}; give {found} or fewer")
    return cluster_H.astype(np.int64), means.cluster_centers_


def clustered_experts(embedding_HD: "Tensor", num_experts: int, columns: int = 1, seed: int = 42) -> np.ndarray:
    """Make one expert of each of E clusters.

    A key has the expert of its own cluster and of the K - 1 next nearest means.

    Each row has the key's own cluster first. Raises `UserError` also as `cluster_keys` does.
    """
    import torch  # here, because other tables are built without torch

    check_columns(num_experts, columns)
    cluster_H, mean_ED = map(torch.from_numpy, cluster_keys(embedding_HD, num_experts, seed))
    blocks = []
    for start in range(0, len(cluster_H), BLOCK):
        own_B1 = cluster_H[start : start + BLOCK].unsqueeze(1)
        rows_BD = embedding_HD[start : start + BLOCK].detach().cpu().double()
        distance_BE = torch.cdist(rows_BD, mean_ED.double(), compute_mode="donot_use_mm_for_euclid_dist")
        distance_BE.scatter_(1, own_B1, -1.0)  # first, even if another one is as near
        blocks.append(distance_BE.argsort(dim=1, stable=True)[:, :columns])
    return torch.cat(blocks).numpy()


def dispersed_experts(cluster_H: Integers, counts: Integers, num_experts: int, columns: int = 1) -> np.ndarray:
    """Spread the keys of each cluster over the experts as evenly as possible, and balance the loads.

    The keys, by descending count, go each to K of the experts that have the fewest keys of its cluster so far. Among
    these, the experts with the smallest loads come first, then those with the lower numbers. So the numbers of keys
    that two experts have of one cluster differ by at most one. Memory: 4 bytes per cluster and expert.

    `cluster_H` is the cluster of each key, 0 or more. The rows are ascending. Raises `UserError` also if clusters and
    counts differ in number.
    """
    check_columns(num_experts, columns)
    count_H, cluster_H = check_counts(counts), np.asarray(cluster_H, dtype=np.int64)
    if len(cluster_H) != len(count_H):
        raise UserError(f"{len(cluster_H)} keys with clusters, but {len(count_H)} counts; give both for each key")
    keys_CE = np.zeros((cluster_H.max() + 1, num_experts), dtype=np.int32)
    load_E = np.zeros(num_experts, dtype=np.int64)
    expert_HK = np.empty((len(count_H), columns), dtype=np.int64)
    beyond = columns * int(count_H.sum()) + 1  # above any load
    for key in np.argsort(-count_H, kind="stable").tolist():
        keys_E = keys_CE[cluster_H[key]]
        # Each expert has the fewest keys or one more. A partition finds the K-th best value on every machine, but its
        # order of equal values differs, so equal ones are taken in their own order.
        badness_E = load_E + beyond * (keys_E > keys_E.min())
        worst = np.partition(badness_E, columns - 1)[columns - 1]
        better = np.flatnonzero(badness_E < worst)
        equal = np.flatnonzero(badness_E == worst)[: columns - len(better)]
        chosen = np.concatenate([better, equal])
        expert_HK[key] = chosen
        load_E[chosen] += count_H[key]
        keys_E[chosen] += 1
    return np.sort(expert_HK, axis=1)
