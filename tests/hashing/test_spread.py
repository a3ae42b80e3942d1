"""Spread tables: the few tokens that overload an expert are spread by the token before them."""

import functools
import random

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_tables import rows_of

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing import HashTable, TableRecord, load_table, save_table
from fairseq_hash.hashing import spread as spread_module
from fairseq_hash.hashing.balance import judge
from fairseq_hash.hashing.builders import balanced_experts, random_experts
from fairseq_hash.hashing.spread import count_pairs, heavy_tokens, spread_counts, spread_table
from fairseq_hash.hashing.table import table_fingerprint

PADDING = 1


def base_table(expert_HK, num_experts, **settings):
    return HashTable(expert_HK, TableRecord("balanced", num_experts, "of symbols", **settings))


def counts_of(text, vocabulary):
    return np.bincount(text, minlength=vocabulary).tolist()


def build(text, vocabulary, num_experts, columns, most_pairs=None):
    """Base table, counts, pairs and spread table of a text."""
    counts = counts_of(text, vocabulary)
    base = base_table(balanced_experts(counts, num_experts, columns), num_experts)
    pairs = count_pairs(text, heavy_tokens(counts, num_experts, columns), PADDING)
    return base, counts, pairs, spread_table(base, counts, pairs, most_pairs)


@functools.cache
def made_text(size, vocabulary, seed=0):
    """A text of Zipf's law in which a token depends on the one before it, as in natural text."""
    generator = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(vocabulary)]
    likely = generator.choices(range(vocabulary), weights, k=vocabulary)
    drawn = generator.choices(range(vocabulary), weights, k=size)
    for place in range(1, size):
        if generator.random() < 0.1:
            drawn[place] = likely[drawn[place - 1]]
    return drawn


few = st.lists(st.integers(0, 4), min_size=20, max_size=80)
texts = st.builds(lambda one, other: [*one, *other, 2, 2, 2], few, st.lists(st.integers(0, 29), max_size=30))
shapes = st.integers(1, 9).flatmap(lambda experts: st.tuples(st.just(experts), st.integers(1, min(experts, 3))))


@given(texts, shapes)
def test_spread_equals_walking_the_text(text, shape):
    num_experts, columns = shape
    base, counts, pairs, table = build(text, 30, num_experts, columns, most_pairs=1000)
    heavy = {token for token in range(30) if counts[token] > columns * len(text) / num_experts}
    assert set(np.flatnonzero(table.index["heavy"]).tolist()) == heavy
    rows, loads = reference.spread_use(text, base.expert_HK.tolist(), heavy, num_experts, columns, PADDING)
    assert table.index["pair"].tolist() == [token * 30 + previous for token, previous in rows]
    assert table.expert_HK[30:].tolist() == list(rows.values())
    assert np.array_equal(table.expert_HK[:30], base.expert_HK)
    balance = judge(table.expert_HK, spread_counts(table.index, counts, pairs), num_experts)
    assert balance.load_E.tolist() == loads
    assert table.record.settings["largest_over_mean"] == pytest.approx(max(loads) / (sum(loads) / num_experts))
    assert table.record.settings["bound_over_mean"] <= table.record.settings["largest_over_mean"] + 1e-9


@given(texts, texts, shapes, st.integers(0, 20))
def test_counts_of_rows_are_those_of_the_lookup(text, other, shape, most_pairs):
    """For the text that the table is built from, and for another one, some of whose pairs it does not have."""
    _, _, _, table = build(text, 30, *shape, most_pairs)
    assert len(table.index["pair"]) <= most_pairs and table.index["pair"].dtype == np.int64
    kept = table.index["pair"].tolist()
    for tokens in (text, other):
        rows = rows_of(table, torch.tensor([tokens]))[0]
        for token, previous, row in zip(tokens, [PADDING, *tokens], rows.tolist(), strict=False):
            pair = token * 30 + previous
            if not table.index["heavy"][token]:
                assert row == token
            else:
                assert row == (30 + kept.index(pair) if pair in kept else previous)
        expected = torch.bincount(rows, minlength=len(table.expert_HK))
        pairs = count_pairs(tokens, table.index["heavy"], PADDING)
        assert spread_counts(table.index, counts_of(tokens, 30), pairs).tolist() == expected.tolist()


@given(texts, shapes, st.integers(0, 20))
def test_of_too_many_pairs_the_most_frequent_are_kept(text, shape, most_pairs):
    _, _, pairs, table = build(text, 30, *shape, most_pairs)
    kept = set(table.index["pair"].tolist())
    count = dict(zip(pairs[0].tolist(), pairs[1].tolist(), strict=True))
    left = [count[pair] for pair in count if pair not in kept]
    assert all(count[pair] > max(left, default=0) for pair in kept)
    if left:  # pairs as frequent as the best that is left out would be too many
        assert sum(occurs >= max(left) for occurs in count.values()) > most_pairs
    settings = table.record.settings
    assert settings["pairs"] == len(kept) and settings["pairs_left_out"] == len(left)


@given(texts)
def test_pairs_do_not_depend_on_blocks(text):
    heavy = np.arange(30) < 3
    expected = {}
    for place, token in enumerate(text):
        if token < 3:
            pair = token * 30 + (text[place - 1] if place else PADDING)
            expected[pair] = expected.get(pair, 0) + 1
    whole = spread_module.BLOCK
    for block in (whole, 7, 1):
        spread_module.BLOCK = block
        try:
            pairs = count_pairs(text, heavy, PADDING)
        finally:
            spread_module.BLOCK = whole
        assert dict(zip(pairs[0].tolist(), pairs[1].tolist(), strict=True)) == expected
        assert pairs[0].tolist() == sorted(expected)


@pytest.mark.parametrize("num_experts, columns", [(16, 1), (32, 1), (64, 4)])
@pytest.mark.parametrize("most_pairs", [None, 500])
def test_spread_is_balanced_where_no_table_of_tokens_is(num_experts, columns, most_pairs):
    base, counts, _, table = build(made_text(200_000, 3000), 3000, num_experts, columns, most_pairs)
    assert judge(base.expert_HK, counts, num_experts).bound_over_mean > 1.05
    assert table.record.settings["largest_over_mean"] <= 1.05


def test_what_cannot_be_balanced_is_said():
    """Token 5 always follows token 4: its one pair is as heavy as itself."""
    text = [4, 5, 6, 7] * 100
    table = build(text, 8, 8, 1)[3]
    assert table.record.settings["largest_over_mean"] == table.record.settings["bound_over_mean"] == 2
    # Six pairs of 100 of three heavy tokens, 180 is the mean load: the experts that these leave empty get two each.
    text = [2, 3, 2, 4, 3, 4] * 100 + list(range(5, 15)) * 84
    settings = build(text, 15, 8, 1)[3].record.settings
    assert settings["largest_over_mean"] == settings["bound_over_mean"] == 200 / 180


def test_a_text_without_heavy_tokens_has_the_table_of_tokens(tmp_path):
    text = list(range(20)) * 3
    base, counts, pairs, table = build(text, 20, 4, 1)
    assert len(pairs[0]) == len(table.index["pair"]) == 0 and np.array_equal(table.expert_HK, base.expert_HK)
    save_table(table, tmp_path / "table.safetensors")
    loaded = load_table(tmp_path / "table.safetensors")
    tokens = torch.tensor([text])
    assert torch.equal(rows_of(loaded, tokens), tokens)


def test_file_keeps_a_spread_table(tmp_path):
    table = build(made_text(5000, 100), 100, 32, 2)[3]
    save_table(table, tmp_path / "table.safetensors")
    loaded = load_table(tmp_path / "table.safetensors")
    assert loaded.record == table.record and loaded.record.builder == "spread"
    assert loaded.record.settings["base"] == "balanced" and loaded.record.settings["heavy_tokens"] > 0
    assert table_fingerprint(loaded.expert_HK, loaded.index) == table_fingerprint(table.expert_HK, table.index)


def test_wrong_input_is_refused_in_one_line():
    text = made_text(2000, 50)
    base, counts, pairs, table = build(text, 50, 16, 1)
    plain = random_experts(50, 16)
    positions, segments = base_table(plain, 16, feature="position"), base_table(plain, 16, is_multi_hash=True)
    for wrong in (table, positions, segments):
        with pytest.raises(UserError, match="starts from a table of token ids to distinct experts"):
            spread_table(wrong, counts, pairs)
    with pytest.raises(UserError, match="49 counts for a hash table of 50 rows"):
        spread_table(base, counts[:-1], pairs)
    with pytest.raises(UserError, match="count tokens and pairs in the same text"):
        spread_table(base, counts, (pairs[0], pairs[1] + 1))
    with pytest.raises(UserError, match="token 49 has 1 pairs, but 0 are expected"):
        spread_table(base, counts, (np.append(pairs[0], 49 * 50), np.append(pairs[1], 1)))
    with pytest.raises(UserError, match="no token counts"):
        heavy_tokens([1, 1], 2)
