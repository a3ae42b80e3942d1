"""Hash tables: fingerprints, files, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fairseq_hash import hashing
from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing import Feature, TableShape
from fairseq_hash.hashing.table import counts_fingerprint


def symbols(size):
    return [f"token{i}" for i in range(size)]


def build(kind="random", size=50, seed=1, counts=None, **shape):
    shape = {"num_experts": 4, **shape}
    return hashing.build_table(kind, symbols(size), counts or [2] * size, TableShape(**shape), seed)


@given(st.lists(st.text(max_size=5), unique=True, min_size=2, max_size=10))
def test_dictionary_fingerprint_tells_every_difference(words):
    fingerprint = hashing.dictionary_fingerprint(words)
    assert fingerprint == hashing.dictionary_fingerprint(list(words))
    assert fingerprint != hashing.dictionary_fingerprint(words[1:] + words[:1])
    # Words that only look the same when written after one another.
    assert fingerprint != hashing.dictionary_fingerprint([words[0] + words[1], *words[2:]])


@pytest.mark.parametrize(
    "shape",
    [
        *({}, {"columns": 3}, {"columns": 3, "is_multi_hash": True}, {"feature": Feature("previous")}),
        {"feature": Feature("ngram", 3), "num_keys": 77},
    ],
)
def test_file_keeps_table_and_record(tmp_path, shape):
    table = build(**shape)
    path = tmp_path / "a table.safetensors"
    hashing.save_table(table, path)
    loaded = hashing.load_table(path)
    assert np.array_equal(loaded.expert_HK, table.expert_HK) and loaded.record == table.record and loaded.index == {}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    again = build(str(path), **shape)
    assert np.array_equal(again.expert_HK, table.expert_HK) and again.record == table.record


def test_balanced_table_keeps_what_it_was_built_from():
    counts = list(range(50))
    record = build("balanced", counts=counts, columns=2).record
    assert record.builder == "balanced" and record.num_experts == 4 and record.seed is None
    assert record.counts_fingerprint == counts_fingerprint(counts)
    assert record.counts_fingerprint != counts_fingerprint(counts[::-1])
    assert record.dictionary_fingerprint == hashing.dictionary_fingerprint(symbols(50))


def test_columns_of_multi_hash_are_tables_of_their_own():
    for kind in ("balanced", "random"):
        expert_HK = build(kind, 800, counts=list(range(800)), columns=3, is_multi_hash=True).expert_HK
        assert np.array_equal(expert_HK[:, :1], build(kind, 800, counts=list(range(800))).expert_HK)
        for one, other in ((0, 1), (0, 2), (1, 2)):  # 200 of 800 keys agree by chance, standard deviation 12
            assert abs(int((expert_HK[:, one] == expert_HK[:, other]).sum()) - 200) < 60


def test_a_damaged_or_foreign_file_is_refused_in_one_line(tmp_path):
    table = build()
    path = tmp_path / "table.safetensors"
    hashing.save_table(table, path)
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:20], b"", b"not a table", b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged or no table file") as error:
            hashing.load_table(path)
        assert "\n" not in str(error.value)
    save_file({"expert": table.expert_HK}, path)
    with pytest.raises(UserError, match="not a hash table of this package"):
        hashing.load_table(path)
    with pytest.raises(UserError, match="neither a builder's name nor an existing table file"):
        hashing.load_table(tmp_path / "missing")
    with pytest.raises(UserError, match="cannot write .* give a file that you can write"):
        hashing.save_table(table, tmp_path / "no folder" / "table.safetensors")


def test_a_table_that_does_not_fit_is_refused(tmp_path):
    path = str(tmp_path / "table.safetensors")
    hashing.save_table(build(), path)
    for wrong, message in (
        ({"size": 51}, "another dictionary"),
        ({"num_experts": 8}, "built for 4 experts, but --num-experts is 8"),
        ({"columns": 2}, "is for --experts-per-token 1"),
        ({"feature": Feature("previous")}, "a table of token, but the model asks for previous"),
    ):
        with pytest.raises(UserError, match=message):
            build(path, **wrong)
    hashing.save_table(build(columns=2, is_multi_hash=True), path)
    with pytest.raises(UserError, match="is for --multi-hash 2"):
        build(path, columns=2)


def test_wrong_entries_are_refused():
    table = build(columns=2)
    for wrong, message in (
        (table.expert_HK + 1, "names expert 4, but there are experts 0 to 3"),
        (table.expert_HK - 1, "names expert -1"),
        (table.expert_HK.astype(np.float32), "int64 NumPy array of shape"),
        (torch.from_numpy(table.expert_HK), "a hash table of torch.int64 .* give an int64 NumPy array of shape"),
        (table.expert_HK.flatten(), "int64 NumPy array of shape"),
        (table.expert_HK[:0], "int64 NumPy array of shape"),
        (np.array([[0, 1], [2, 2]]), r"an expert twice for one token \(row 1: \[2, 2\]\)"),
    ):
        with pytest.raises(UserError, match=message):
            replace(table, expert_HK=wrong)
    multi_hash = replace(table.record, is_multi_hash=True)
    replace(table, expert_HK=np.array([[0, 1], [2, 2]]), record=multi_hash)


def test_a_builder_that_cannot_is_refused():
    for kind, changes, message in (
        ("random", {"size": 5, "counts": [2] * 4}, "4 counts for 5 symbols"),
        ("balanced", {"counts": [1] * 50}, "no token counts"),
        ("random", {"feature": Feature("word")}, "word needs a table file"),
        ("balanced", {"feature": Feature("bigram"), "num_keys": 9}, "balanced has no counts for --hash-feature bigram"),
        (
            "modulo",
            {"columns": 2, "is_multi_hash": True},
            "--multi-hash 2 needs a builder that can make different tables",
        ),
    ):
        with pytest.raises(UserError, match=message):
            build(kind, **changes)
