"""Loads, drops and stragglers known before a job: against naive loops, and against what ranks really dispatch."""

import math

import numpy as np
import pytest
import ranks
import torch

from fairseq_hash.core.errors import UserError
from fairseq_hash.moe.planned_loads import RoutedBatches, choices, drawn_batches
from fairseq_hash.parallel.groups import ExpertParallel

KEYS, EXPERTS = 20, 8
WITH_COPIES = (0, 1, 5, 0, 1, 7, 0, 2, 3, 1, 4, 6)  # of experts 0 and 1, on three of four ranks
# Experts of a key, and whether they are those of hash functions.
FORMS = {"one": (1, False), "three": (3, False), "two hash functions": (2, True)}


def make_table(form, seed=0):
    """Return a table `[H, K]` whose experts are used unevenly, and whether it is MultiHash."""
    generator, (columns, is_multi_hash) = np.random.default_rng(seed), FORMS[form]
    share = generator.dirichlet(np.ones(EXPERTS))
    rows = [generator.choice(EXPERTS, columns, replace=is_multi_hash, p=share) for _ in range(KEYS)]
    return np.array(rows), is_multi_hash


def make_batches(number, seed=1):
    """Return the keys of each of some batches of 0 to 30 tokens."""
    generator = np.random.default_rng(seed)
    share = generator.dirichlet(np.full(KEYS, 0.5))
    return [generator.choice(KEYS, generator.integers(0, 31), p=share) for _ in range(number)]


def routed(expert_HK, is_multi_hash, batches):
    """Return the routed batches."""
    counts = [np.bincount(key_T, minlength=KEYS) for key_T in batches]
    found = np.stack([choices(expert_HK, count_H, EXPERTS, is_multi_hash) for count_H in counts])
    return RoutedBatches(found, expert_HK.shape[1] if is_multi_hash else 1)


def naive_rows(expert_HK, is_multi_hash, key_T, factor):
    """Return the rows of each group of one batch, token by token, and how many choices found their group full."""
    columns = expert_HK.shape[1]
    groups = EXPERTS * columns if is_multi_hash else EXPERTS
    most = math.ceil(round(len(key_T) * columns * factor / groups, 6)) if factor else math.inf
    taken, dropped = {}, 0
    for key in key_T:
        for column, expert in enumerate(expert_HK[key]):
            group = (int(expert), column if is_multi_hash else 0)
            if taken.get(group, 0) < most:
                taken[group] = taken.get(group, 0) + 1
            else:
                dropped += 1
    return taken, dropped


def of_experts(taken):
    """Return the rows of each expert."""
    return [sum(count for (one, _), count in taken.items() if one == expert) for expert in range(EXPERTS)]


def rows_at(place, parallel, batches):
    """Return the rows that the rank at a place gets: of each sender its part of those of a copy, dealt out in turn."""
    rows = 0
    for sender, taken in enumerate(batches):
        for (expert, _), count in taken.items():
            holders = [other for other in range(parallel.size) if expert in parallel.experts_at(other)]
            for row in range(count):
                rows += holders[(row - sender) % len(holders)] == place
    return rows


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("factor", [0.0, 0.7, 1.25])
@pytest.mark.parametrize(("size", "order"), [(1, None), (2, None), (4, (0, 5, 1, 7, 2, 3, 4, 6)), (4, WITH_COPIES)])
def test_rows_drops_and_stragglers_are_those_of_a_loop_over_tokens(form, factor, size, order):
    expert_HK, is_multi_hash = make_table(form)
    batches = make_batches(11)  # of the last ones some are too few for a pass
    found = routed(expert_HK, is_multi_hash, batches)
    parallel = ExpertParallel(EXPERTS, size, 0, size)
    parallel = parallel.placed(order) if order else parallel
    naive = [naive_rows(expert_HK, is_multi_hash, key_T, factor) for key_T in batches]
    total = sum(map(len, batches)) * expert_HK.shape[1]
    assert found.dropped_share(factor) == pytest.approx(sum(dropped for _, dropped in naive) / total, abs=1e-12)
    unlimited = [of_experts(naive_rows(expert_HK, is_multi_hash, key_T, 0)[0]) for key_T in batches]
    assert found.load_E.tolist() == np.sum(unlimited, axis=0).tolist()
    row_NP = found.rank_rows(parallel, factor)
    assert len(row_NP) == 11 // size
    for number, row_P in enumerate(row_NP.tolist()):
        of_pass = [taken for taken, _ in naive[number * size : (number + 1) * size]]
        held = [rows_at(place, parallel, of_pass) for place in range(size)]
        assert row_P == held
        straggler = max(held) / (sum(held) / size) if sum(held) else 1
        assert found.stragglers(parallel, factor)[number] == pytest.approx(straggler)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_dispatch_what_was_planned(world_size):
    """Rows of every rank and dropped choices of every batch, exactly.

    Whole groups and groups of two, placed experts, and copies of some.
    """
    cases, planned = [], []
    orders = {2: [(1, 2, 4, 7, 0, 3, 5, 6), (0, 1, 2, 4, 7, 0, 1, 3, 5, 6)], 4: [(0, 5, 1, 7, 2, 3, 4, 6), WITH_COPIES]}
    for form in FORMS:
        for size in {2, world_size}:
            for order in ((), *orders[size]):
                for factor in (0.0, 0.7):
                    expert_HK, is_multi_hash = make_table(form)
                    batches = make_batches(3 * world_size, seed=len(cases))
                    segments = expert_HK.shape[1] if is_multi_hash else 1
                    tensors = [torch.from_numpy(key_T) for key_T in batches]
                    cases.append((torch.from_numpy(expert_HK), EXPERTS, segments, size, order, factor, tensors))
                    found = routed(expert_HK, is_multi_hash, batches)
                    parallel = ExpertParallel(EXPERTS, size, 0, world_size)
                    parallel = parallel.placed(order) if order else parallel
                    dropped_N = (found.choice_NG - found.kept_NG(factor)).sum(axis=1)
                    planned.append((found.rank_rows(parallel, factor).reshape(-1), dropped_N))
    reports = ranks.run(world_size, "load_ranks:rows_of_passes", cases)
    for number, (row_N, dropped_N) in enumerate(planned):
        of_case = [report[number] for report in reports]
        assert [of_rank[at][0] for at in range(3) for of_rank in of_case] == row_N.tolist()
        assert [of_rank[at][1] for at in range(3) for of_rank in of_case] == dropped_N.tolist()
    assert any(dropped_N.any() for _, dropped_N in planned)


@pytest.mark.parametrize("form", FORMS)
def test_drawn_batches_are_those_of_tokens_drawn_one_by_one(form):
    """Loads within three deviations of the expected, and stragglers and drops as of an independent sample."""
    expert_HK, is_multi_hash = make_table(form)
    count_H = np.random.default_rng(5).integers(0, 50, KEYS)
    tokens, batches, size = 64, 2000, 4
    of = (expert_HK, count_H, EXPERTS, is_multi_hash, tokens, batches * size)
    drawn = drawn_batches(*of, np.random.default_rng(0))
    assert (drawn.choice_NG.sum(axis=1) == tokens * expert_HK.shape[1]).all()
    again = drawn_batches(*of, np.random.default_rng(0))
    assert np.array_equal(drawn.choice_NG, again.choice_NG)
    share_G = choices(expert_HK, count_H, EXPERTS, is_multi_hash) / count_H.sum()
    error = drawn.choice_NG.mean(axis=0) - tokens * share_G
    assert (np.abs(error) <= 4 * np.sqrt(tokens * share_G / (batches * size)) + 1e-9).all()
    generator = np.random.default_rng(7)
    one_by_one = [generator.choice(KEYS, tokens, p=count_H / count_H.sum()) for _ in range(batches)]
    other = routed(expert_HK, is_multi_hash, one_by_one)
    parallel = ExpertParallel(EXPERTS, size, 0, size)
    for factor in (0.0, 1.0):
        assert drawn.dropped_share(factor) == pytest.approx(other.dropped_share(factor), abs=0.01)
        ours, theirs = drawn.stragglers(parallel, factor), other.stragglers(parallel, factor)
        assert ours.mean() == pytest.approx(theirs.mean(), rel=0.02)
        assert np.quantile(ours, 0.95) == pytest.approx(np.quantile(theirs, 0.95), rel=0.03)


def test_larger_batches_have_smaller_stragglers_down_to_the_expected_loads():
    expert_HK = np.arange(KEYS)[:, None] % EXPERTS
    count_H = np.full(KEYS, 3)  # 9 or 6 for each expert: 18 for the first two ranks, 12 for the others
    parallel = ExpertParallel(EXPERTS, 4, 0, 4)
    load_P = choices(expert_HK, count_H, EXPERTS, False).reshape(4, -1).sum(axis=1)
    limit = load_P.max() / load_P.mean()
    means = []
    for tokens in (16, 256, 65536):
        drawn = drawn_batches(expert_HK, count_H, EXPERTS, False, tokens, 400, np.random.default_rng(0))
        means.append(drawn.stragglers(parallel).mean())
    assert limit == 1.2 and means[0] > means[1] > means[2] == pytest.approx(limit, rel=0.01)


def test_too_few_batches_for_a_pass_are_refused():
    found = routed(*make_table("one"), make_batches(3))
    with pytest.raises(UserError, match="3 batches are too few for one pass of 4 ranks"):
        found.stragglers(ExpertParallel(EXPERTS, 4, 0, 4))
