"""Clusters of tokens with similar embeddings, as experts or spread over the experts.

Hash Layers (Roller et al. 2021), section 3, clustered and dispersed hash: k-means of the embeddings of a trained model.

Shape suffixes: see `losses`; H is the number of keys, a table's rows.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing.builders import check_columns, check_counts

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4096  # rows at a time, which bounds memory


def check_embedding(embedding_HD: "Tensor", num_keys: int) -> None:
    """Raise `UserError` unless the embedding is a matrix with one finite row for each of H keys."""
    if embedding_HD.dim() != 2 or len(embedding_HD) != num_keys:
        raise UserError(
            f"the embedding has shape {tuple(embedding_HD.shape)}, the dictionary {num_keys} symbols; "
            "give the embedding of a model with this dictionary, one row for each symbol"
        )
    finite_H = embedding_HD.isfinite().all(dim=1)
    if not finite_H.all():
        row = int((~finite_H).nonzero()[0])
        raise UserError(f"row {row} of the embedding is not finite; give the embedding of a sound model")


def cluster_keys(embedding_HD: "Tensor", num_clusters: int, seed: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """Group keys by k-means (scikit-learn's, from one k-means++ start).

    It runs on one thread: sums of several threads are added in the order in which these happen to end, which changes
    last digits and in the end labels. Another processor or version of its libraries may still round otherwise, so that
    a clustered table is to be kept as a file.

    Args:
        embedding_HD: floating point `[H, D]`.
        num_clusters: from 1 to H.
        seed: from 0 to 2^32 - 1.

    Returns:
        The cluster of each key, int64 `[H]`, and the clusters' means, float32 `[clusters, D]`.

    Raises:
        UserError: where there are more clusters than keys, or than different rows, or a row is not finite.
    """
    # Here, as importing hashing takes no scikit-learn.
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    check_embedding(embedding_HD, len(embedding_HD))
    if not 1 <= num_clusters <= len(embedding_HD):
        raise UserError(f"{num_clusters} clusters of {len(embedding_HD)} keys; give 1 to {len(embedding_HD)}")
    means = KMeans(num_clusters, n_init=1, random_state=seed)
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of too few different rows: refused below
        cluster_H = means.fit_predict(embedding_HD.detach().cpu().float().numpy())
    found = len(np.unique(cluster_H))
    if found < num_clusters:
        raise UserError(f"the embedding's rows fall into {found} clusters, not {num_clusters}; give {found} or fewer")
    return cluster_H.astype(np.int64), means.cluster_centers_


def clustered_experts(embedding_HD: "Tensor", num_experts: int, columns: int = 1, seed: int = 42) -> np.ndarray:
    """Make one expert of each of E clusters; a key has that of its own and those of the K - 1 next nearest means.

    Args:
        embedding_HD: floating point `[H, D]`.
        num_experts: E, at most H.
        columns: K.
        seed: of k-means.

    Returns:
        int64 `[H, K]`, the key's own cluster first.

    Raises:
        UserError: as `cluster_keys`, or where K is not from 1 to E.
    """
    import torch  # here, as an embedding is a tensor, and other tables are built without torch

    check_columns(num_experts, columns)
    cluster_H, mean_ED = map(torch.from_numpy, cluster_keys(embedding_HD, num_experts, seed))
    blocks = []
    for start in range(0, len(cluster_H), BLOCK):
        own_B1 = cluster_H[start : start + BLOCK].unsqueeze(1)
        rows_BD = embedding_HD[start : start + BLOCK].detach().cpu().double()
        distance_BE = torch.cdist(rows_BD, mean_ED.double(), compute_mode="donot_use_mm_for_euclid_dist")
        distance_BE.scatter_(1, own_B1, -1.0)  # first, even where another one is as near
        blocks.append(distance_BE.argsort(dim=1, stable=True)[:, :columns])
    return torch.cat(blocks).numpy()


def dispersed_experts(
    cluster_H: Sequence[int], counts: Sequence[int], num_experts: int, columns: int = 1
) -> np.ndarray:
    """Spread the keys of each cluster over the experts as evenly as can be, and balance the loads.

    The keys, by descending count, go each to K of the experts that have the fewest keys of its cluster so far; among
    these to the ones with the smallest loads, then to the lower ones. So the numbers of keys that two experts have of
    one cluster differ by one at most. Memory: 4 bytes for each cluster and expert.

    Args:
        cluster_H: the cluster of each key, 0 or more, `[H]`.
        counts: how often each key occurs in the training text, `[H]`.
        num_experts: E.
        columns: K.

    Returns:
        int64 `[H, K]`, ascending in each row.

    Raises:
        UserError: where the counts carry no information, clusters and counts differ in number, or K is not 1 to E.
    """
    check_columns(num_experts, columns)
    count_H, cluster_H = check_counts(counts), np.asarray(cluster_H, dtype=np.int64)
    if len(cluster_H) != len(count_H):
        raise UserError(f"{len(cluster_H)} keys with clusters, but {len(count_H)} counts; give both for each key")
    keys_CE = np.zeros((cluster_H.max() + 1, num_experts), dtype=np.int32)
    load_E = np.zeros(num_experts, dtype=np.int64)
    expert_HK = np.empty((len(count_H), columns), dtype=np.int64)
    beyond = columns * int(count_H.sum()) + 1  # any load is below
    for key in np.argsort(-count_H, kind="stable").tolist():
        keys_E = keys_CE[cluster_H[key]]
        # Each expert has the fewest keys or one more. A partition finds the K-th best value, the same everywhere; which
        # of equal ones it puts before that is not, so these are taken in their order.
        badness_E = load_E + beyond * (keys_E > keys_E.min())
        worst = np.partition(badness_E, columns - 1)[columns - 1]
        better = np.flatnonzero(badness_E < worst)
        equal = np.flatnonzero(badness_E == worst)[: columns - len(better)]
        chosen = np.concatenate([better, equal])
        expert_HK[key] = chosen
        load_E[chosen] += count_H[key]
        keys_E[chosen] += 1
    return np.sort(expert_HK, axis=1)
