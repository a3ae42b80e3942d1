"""Checkpoints of gated experts with learned weights and a table for each layer: other ranks, evaluation, tables."""

import hashlib
import json

import numpy as np
import pytest
import ranks
import torch
from called import refused
from checkpoint_ranks import resume_all
from plugin import evaluate
from saved_checkpoints import done

from fairseq_hash.cli.tables import read_dictionary
from fairseq_hash.hashing import Feature, TableShape, build_table, load_table
from fairseq_hash.hashing.table import table_fingerprint

WORDS = ("--router", "hash", "--num-experts", "4", "--sparse-layers", "0,1", "--max-tokens", "48", "--expert-form")
WORDS += ("swiglu", "--shared-expert", "--experts-per-token", "2", "--hash-weights", "learned", "--hash-per-layer")
WORDS += ("--hash-feature", "previous", "--hash-table", "random", "--optimizer", "adam", "--lr", "1e-3")


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """The folder of a checkpoint of two ranks after 3 updates, and the states of these ranks."""
    folder = tmp_path_factory.mktemp("two ranks")
    states = ranks.run(2, "checkpoint_ranks:save", str(data), (*WORDS, "--save-dir", str(folder)), 3)
    return folder, states


def test_one_process_goes_on_with_what_two_ranks_have_saved(data, saved):
    folder, states = saved
    loaded = resume_all(str(data), {"": (*WORDS, "--save-dir", str(folder))}, 4)[""]["loaded"]
    for name, value in loaded.items():
        parts = [state["state"][name] for state in states]
        assert torch.equal(value, torch.cat(parts) if ".experts." in name else parts[0]), name


def test_its_facts_its_evaluation_and_its_tables(data, saved, tmp_path):
    folder, _ = saved
    path = folder / "checkpoint_last.pt"
    found = json.loads(done("show", path, "--json"))
    expected = {"kind": "sharded", "experts": 4, "model_width": 16, "expert_hidden_width": 32, "router": "hash"}
    assert expected.items() <= found.items() and found["sparse_layers"] == [0, 1]
    results = [evaluate(data, path, *more) for more in ((), ("--model-overrides", "{'map_experts': True}"))]
    lines = [[line for line in r.stdout.splitlines() + r.stderr.splitlines() if "Perplexity" in line] for r in results]
    assert len(lines[0]) == 1 and lines[0][0].split("|")[-1] == lines[1][0].split("|")[-1]

    table = ("checkpoint", "table", path, "--out", tmp_path / "t")
    assert "has 2 hash tables; choose one by --number 0 to 1" in refused(*table)
    assert "has tables 0 to 1" in refused(*table, "--number", "2")
    known = read_dictionary(data / "dict.txt")
    shape = TableShape(4, 2, feature=Feature("previous"))
    for number, seed in ((0, 42), (1, 44)):
        done("table", path, "--number", str(number), "--out", tmp_path / f"{number}")
        table = load_table(tmp_path / f"{number}")
        assert table.feature == Feature("previous")
        assert np.array_equal(table.expert_HK, build_table("random", *known, shape, seed).expert_HK)
    prints = "".join(load_table(tmp_path / f"{number}").fingerprint for number in (0, 1))
    assert found["table_fingerprint"] == hashlib.sha256(prints.encode()).hexdigest()
    # Training goes on with the files in place of the builder: they are the same tables.
    files = ("--hash-table", f"{tmp_path}/0,{tmp_path}/1")
    words = [word for word in WORDS if word != "--hash-per-layer"]
    again = resume_all(str(data), {"": (*words, *files, "--save-dir", str(folder))}, 4)[""]
    assert again["at"] == 3


def test_another_feature_is_another_table(data, saved):
    folder, _ = saved
    with pytest.raises(SystemExit, match="has hash table .*, this model has "):
        resume_all(str(data), {"": (*WORDS, "--hash-feature", "token", "--save-dir", str(folder))}, 4)


def test_a_fingerprint_tells_feature_and_index():
    table = np.zeros((3, 1), dtype=np.int64)
    index = {"pair": np.array([4, 5])}
    prints = [
        table_fingerprint(table),
        table_fingerprint(table, {}, Feature("previous")),
        table_fingerprint(table, index),
        table_fingerprint(table, {"pair": np.array([4, 6])}),
        table_fingerprint(table, {"pairs": np.array([4, 5])}),
    ]
    assert len(set(prints)) == len(prints)
    assert table_fingerprint(table, {}, Feature()) == prints[0]
