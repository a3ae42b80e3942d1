"""How even loads are: bounds against the best of all tables, figures against their definitions."""

import math
import statistics
from itertools import combinations, product

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing.balance import filling_bound, judge, lower_bound
from fairseq_hash.hashing.builders import random_experts

few_counts = st.lists(st.integers(0, 12), min_size=1, max_size=6).map(lambda counts: [*counts, 1][:6])
shapes = st.sampled_from([(1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (3, 3), (4, 3)])


def all_rows(num_experts, columns):
    return list(combinations(range(num_experts), columns))


@settings(max_examples=60)
@given(few_counts, shapes)
def test_no_table_is_below_the_bound(counts, shape):
    best = reference.smallest_largest_load(counts, shape[0], all_rows(*shape))
    assert max(counts) <= lower_bound(counts, *shape) <= best


@settings(max_examples=40)
@given(few_counts, shapes, st.lists(st.integers(0, 20), min_size=4, max_size=4))
def test_no_table_on_top_of_loads_is_below_their_bound(counts, shape, loads):
    loads = loads[: shape[0]]
    best = reference.smallest_largest_load(counts, shape[0], all_rows(*shape), loads)
    bound = filling_bound(counts, np.array(loads), shape[1])
    assert max(loads) <= bound <= best


@settings(max_examples=40)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=3), st.integers(1, 3), st.integers(1, 2))
def test_no_multi_hash_table_is_below_its_bound(counts, num_experts, columns):
    """Every choice of hash functions, those that give a key the same expert twice included."""
    counts = [*counts, 1]
    rows = list(product(range(num_experts), repeat=columns))
    table = np.array([rows[-1]] * len(counts))
    bound = judge(table, counts, num_experts, is_multi_hash=True).bound
    assert bound <= reference.smallest_largest_load(counts, num_experts, rows)


def test_bounds_by_hand():
    assert lower_bound([10, 1, 1], 3) == 10  # the largest count
    assert lower_bound([4, 4, 3], 2) == 7  # three keys, two experts: two of them meet
    assert lower_bound([4, 2, 2, 1], 2) == 5  # the mean load, rounded up
    assert lower_bound([5, 5, 5, 5], 3, 2) == 15  # eight places, three experts: one has three keys
    assert lower_bound([5, 1], 2, 2) == 6
    assert lower_bound([9, 5], 3, 2) == 14  # two keys with two of three experts each: they share one
    # With MultiHash the second key may have the third expert twice.
    assert judge(np.array([[0, 1], [2, 2]]), [9, 5], 3, is_multi_hash=True).bound == 10
    assert filling_bound([5, 5, 5], np.array([0, 0, 9])) == 10
    assert filling_bound([5, 5, 5], np.array([0, 0, 0])) == 5
    assert filling_bound([1, 1], np.array([0, 7])) == 7
    assert filling_bound([5], np.array([0, 8, 9]), 2) == 13  # not twice on the empty one
    assert filling_bound([], np.array([3, 7])) == 7


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.integers(1, 6), st.booleans(), st.data())
def test_figures_equal_their_definitions(counts, num_experts, is_multi_hash, data):
    counts = [*counts, 1]
    columns = data.draw(st.integers(1, num_experts))
    if is_multi_hash:
        expert_HK = np.concatenate(
            [random_experts(len(counts), num_experts, 1, seed) for seed in range(columns)], axis=1
        )
    else:
        expert_HK = random_experts(len(counts), num_experts, columns, 1)
    balance = judge(expert_HK, counts, num_experts, is_multi_hash)
    loads = reference.loads_of(expert_HK.tolist(), counts, num_experts)
    assert balance.load_E.tolist() == loads and balance.load_E.dtype.name == "int64"
    mean = columns * sum(counts) / num_experts
    shares = [load / sum(loads) for load in loads if load]
    entropy = -sum(share * math.log(share) for share in shares)
    assert balance.mean == pytest.approx(mean)
    assert balance.largest_over_mean == pytest.approx(max(loads) / mean)
    assert balance.smallest_over_mean == pytest.approx(min(loads) / mean)
    assert balance.coefficient_of_variation == pytest.approx(statistics.pstdev(loads) / mean)
    assert balance.entropy == pytest.approx(entropy, abs=1e-9)
    assert balance.entropy_share == pytest.approx(entropy / math.log(num_experts) if num_experts > 1 else 1, abs=1e-9)
    assert balance.bound_over_mean == pytest.approx(balance.bound / mean) and balance.bound <= max(loads)
    overloading = sorted((h for h in range(len(counts)) if counts[h] > mean), key=lambda h: -counts[h])
    assert balance.overloading.tolist() == overloading
    assert balance.overloading_counts.tolist() == [counts[h] for h in overloading]


def test_perfect_balance():
    balance = judge(np.array([[0], [1], [2]]), [7, 7, 7], 3)
    assert balance.largest_over_mean == balance.smallest_over_mean == balance.bound_over_mean == 1
    assert balance.coefficient_of_variation == 0 and balance.entropy_share == pytest.approx(1)
    assert len(balance.overloading) == 0
    assert str(judge(np.array([[0]]), [7], 1).entropy) == "0.0"


def test_wrong_input_is_refused_in_one_line():
    table = np.array([[0], [1]])
    with pytest.raises(UserError, match="3 counts for a hash table of 2 rows; give one for each row"):
        judge(table, [1, 2, 3], 2)
    with pytest.raises(UserError, match="all counts are 0"):
        judge(table, [0, 0], 2)
