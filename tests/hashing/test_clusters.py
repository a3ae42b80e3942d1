"""Clusters as experts, and clusters spread over experts."""

import os
import subprocess
import sys

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from table_builders import experts_and_columns, zipf
from threadpoolctl import threadpool_info, threadpool_limits

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing import clusters as clusters_module
from fairseq_hash.hashing.balance import judge
from fairseq_hash.hashing.builders import random_experts
from fairseq_hash.hashing.clusters import cluster_keys, clustered_experts, dispersed_experts
from fairseq_hash.hashing.table import table_fingerprint

counts_and_clusters = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), min_size=1, max_size=60)


def blobs(size=600, groups=8, width=16):
    """Embeddings around far-apart centres, and the group of each."""
    generator = torch.Generator().manual_seed(0)
    group_H = torch.arange(size) % groups
    centre_GD = 10 * torch.randn(groups, width, generator=generator)
    return centre_GD[group_H] + torch.randn(size, width, generator=generator), group_H


def test_clusters_are_the_groups_that_there_are():
    embedding_HD, group_H = blobs()
    cluster_H, mean_CD = cluster_keys(embedding_HD, 8, seed=1)
    assert len(set(zip(cluster_H.tolist(), group_H.tolist(), strict=True))) == 8
    for cluster in range(8):
        mean_D = embedding_HD[cluster_H == cluster].mean(dim=0)
        assert np.allclose(mean_CD[cluster], mean_D, atol=1e-4)
    assert cluster_H.dtype == np.int64 and mean_CD.shape == (8, 16)


@pytest.mark.parametrize("columns", [1, 3])
def test_clustered_rows_are_the_nearest_means(columns):
    embedding_HD = torch.randn(300, 5, generator=torch.Generator().manual_seed(1))
    cluster_H, mean_ED = cluster_keys(embedding_HD, 9, seed=2)
    expert_HK = clustered_experts(embedding_HD, 9, columns, seed=2)
    assert np.array_equal(expert_HK[:, 0], cluster_H)
    for embedding_D, row in zip(embedding_HD.tolist(), expert_HK.tolist(), strict=True):
        distance = [sum((a - b) ** 2 for a, b in zip(embedding_D, mean_D, strict=True)) for mean_D in mean_ED.tolist()]
        assert row[1:] == [e for e in sorted(range(9), key=distance.__getitem__) if e != row[0]][: columns - 1]


def test_the_own_cluster_comes_first_even_where_another_is_as_near(monkeypatch):
    clusters = np.array([1, 0]), np.array([[0.0], [10.0]])
    monkeypatch.setattr(clusters_module, "cluster_keys", lambda *_: clusters)
    assert clustered_experts(torch.tensor([[5.0], [5.0]]), 2, 2).tolist() == [[1, 0], [0, 1]]


def test_k_means_has_one_thread(monkeypatch):
    """Few points show what the order of threads does to sums, so this looks at the threads themselves."""
    seen = []
    fit_predict = KMeans.fit_predict

    def watched(self, points):
        seen.extend(library["num_threads"] for library in threadpool_info())
        return fit_predict(self, points)

    monkeypatch.setattr(KMeans, "fit_predict", watched)
    with threadpool_limits(2):
        cluster_keys(blobs(20)[0], 2)
    assert set(seen) == {1}


def test_clusters_do_not_depend_on_threads_or_process():
    """Unstructured points, where k-means takes many steps and the last digits of sums matter. scikit-learn is imported
    only where it is used."""
    program = (
        "import sys, torch; from fairseq_hash.hashing.clusters import clustered_experts\n"
        "from fairseq_hash.hashing.table import table_fingerprint\n"
        "assert 'sklearn' not in sys.modules\n"
        "points = torch.randn(6000, 32, generator=torch.Generator().manual_seed(3))\n"
        "print(table_fingerprint(clustered_experts(points, 32, 2, seed=4)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "5", "OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    points = torch.randn(6000, 32, generator=torch.Generator().manual_seed(3))
    assert done.stdout.strip() == table_fingerprint(clustered_experts(points, 32, 2, seed=4))


@given(counts_and_clusters, experts_and_columns)
def test_dispersed_equals_naive_loop(keys, shape):
    counts, clusters = [count for count, _ in keys] + [2], [cluster for _, cluster in keys] + [0]
    expected = reference.dispersed_rows(clusters, counts, *shape)
    assert dispersed_experts(clusters, counts, *shape).tolist() == expected


@given(counts_and_clusters, experts_and_columns)
def test_dispersed_has_each_cluster_evenly_on_the_experts(keys, shape):
    counts, clusters = [count for count, _ in keys] + [2], [cluster for _, cluster in keys] + [0]
    expert_HK = dispersed_experts(np.array(clusters), counts, *shape)
    for cluster in set(clusters):
        members = expert_HK[np.array(clusters) == cluster]
        keys_E = np.bincount(members.ravel(), minlength=shape[0])
        assert keys_E.max() - keys_E.min() <= 1


@pytest.mark.parametrize("columns", [1, 4])
def test_dispersed_is_balanced(columns):
    """On Zipf counts with a flat head: near the bound, and never worse than random tables are on average."""
    counts, clusters = zipf(8000, flat=50), np.arange(8000) * 7919 % 64
    balance = judge(dispersed_experts(clusters, counts, 64, columns), counts, 64)
    random = [judge(random_experts(8000, 64, columns, seed), counts, 64).largest_over_mean for seed in range(5)]
    assert balance.largest_over_mean <= 1.05 * balance.bound_over_mean
    assert balance.largest_over_mean <= sum(random) / len(random)


def test_wrong_input_is_refused_in_one_line():
    embedding_HD, _ = blobs(20)
    two_HD = torch.tensor([[0.0], [1.0]]).repeat(5, 1)
    for build, wrong, line in (
        (cluster_keys, (embedding_HD, 21), "21 clusters of 20 keys; give 1 to 20"),
        (clustered_experts, (embedding_HD, 21), "21 clusters of 20 keys; give 1 to 20"),
        (cluster_keys, (embedding_HD, 0), "0 clusters of 20 keys"),
        (clustered_experts, (embedding_HD, 3, 4), "4 distinct experts per token of 3 experts"),
        (cluster_keys, (two_HD, 3), "fall into 2 clusters, not 3; give 2 or fewer"),
        (dispersed_experts, ([0, 0, 0], [2, 2], 2), "3 keys with clusters, but 2 counts; give both for each key"),
    ):
        with pytest.raises(UserError, match=line):
            build(*wrong)
