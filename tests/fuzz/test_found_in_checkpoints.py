"""What fuzzing has found in readers of checkpoints and shards.

Each input is the smallest that showed a traceback, or took too long or too much memory. Now it ends in one line.
"""

import hashlib
import io
import json

import pytest
import torch
from fuzz_formats import pickle_with_command, safetensors_tree, torch_bytes, zip_tree
from fuzz_found import DEEP, refused, written
from fuzz_seeds import run_files

from fairseq_hash.api.loading import task_of
from fairseq_hash.checkpoint.hash_tables import tables_of
from fairseq_hash.checkpoint.inspection import facts
from fairseq_hash.checkpoint.loading import read_checkpoint
from fairseq_hash.checkpoint.mainfile import read_main
from fairseq_hash.checkpoint.manifest import Manifest
from fairseq_hash.checkpoint.sharded_tensor import open_shards
from fairseq_hash.checkpoint.shards import Shard, ShardFile


def shard_of(path, experts=2):
    content = path.read_bytes()
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    return Shard(path.name, "weights", 0, experts, len(content), hashlib.sha256(header).hexdigest())


def spoilt_shard(folder, change):
    (content, *_) = (one for name, one in run_files("hash").items() if "weights" in name)
    tree = safetensors_tree(content)
    header = json.loads(json.dumps(tree.value["header"]))
    change(header)
    return written(folder / "s.safetensors", tree.dump({**tree.value, "header": header}))


SPOILT = {
    "a tensor that is a word": lambda header: header.update({next(name for name in header if "fc1" in name): "nan"}),
    "no checksums": lambda header: header["__metadata__"]["about"].pop("rows_sha256"),
    "checksums of one tensor too few": lambda header: header["__metadata__"]["about"]["rows_sha256"].popitem(),
    "one checksum too few": lambda header: next(iter(header["__metadata__"]["about"]["rows_sha256"].values())).pop(),
    "nested": lambda header: header["__metadata__"].update(about=DEEP),
    "no metadata": lambda header: header.pop("__metadata__"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_shard_whose_header_is_damaged_and_meant(tmp_path, what):
    path = spoilt_shard(tmp_path, SPOILT[what])
    assert "is damaged" in refused(ShardFile, path, shard_of(path))


def test_a_shard_of_other_experts_than_the_manifest_says(tmp_path):
    path = spoilt_shard(tmp_path, lambda header: None)
    assert "for 4 experts" in refused(ShardFile, path, shard_of(path, 4))


def test_a_manifest_of_a_thousand_billion_experts(tmp_path):
    """Each of them was counted."""
    shard = {"file": "a", "part": "weights", "first": 0, "experts": 2**40, "bytes": 1, "header_sha256": ""}
    plain = {"format": 1, "save": "a", "update": 1, "num_experts": 4, "router": "hash", "dictionary_fingerprint": ""}
    manifest = Manifest.of({"fairseq_hash": {**plain, "table_fingerprint": None, "shards": [shard]}}, "a file")
    assert "hold experts 0 to 1099511627775, not 0 to 3" in refused(open_shards, tmp_path, manifest, "weights")


def test_a_manifest_with_other_kinds_within_its_lists():
    plain = {"format": 1, "save": "a", "update": 1, "num_experts": 4, "router": "hash", "dictionary_fingerprint": ""}
    plain |= {"table_fingerprint": None, "shards": []}
    for entry in (
        {"experts": [1]},
        {"numbers": {"a": "b"}},
        {"update": True},
        {"save": "\ud800"},
        {"provenance": {"a": torch.ones(1)}},
    ):
        assert "damaged manifest" in refused(Manifest.of, {"fairseq_hash": plain | entry}, "a file")


def main_with(folder, pickled):
    tree = zip_tree(torch_bytes({"model": {}}))
    (name,) = (name for name in tree.value if name.endswith("data.pkl"))
    return written(folder / "c.pt", tree.dump({**tree.value, name: pickled}))


@pytest.mark.parametrize("pickled", [b"\x80\x02a.", b"\x80\x02}(u.", b"\x80\x02]" * 9 + b"a.", b".", b"\x80\x02h\x01."])
def test_a_main_file_whose_pickle_is_damaged(tmp_path, pickled):
    """torch's reader raises IndexError, KeyError and others."""
    assert "c.pt is " in refused(read_main, main_with(tmp_path, pickled))


def test_a_main_file_runs_nothing(tmp_path):
    assert "would run code" in refused(read_main, main_with(tmp_path, pickle_with_command()))
    assert "torch did not write it" in refused(read_main, written(tmp_path / "c.pt", pickle_with_command()))


def test_a_main_file_that_names_what_a_terminal_would_obey(tmp_path):
    message = refused(read_main, main_with(tmp_path, b"\x80\x02ctorch\nFl\x00\x1b[31m\n."))
    assert "?" in message


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"model": {"w": 1}}, "its model"),
        ({"model": [torch.zeros(1)]}, "its model"),
        ({"model": None}, "its model"),
        ({"model": {}, "optimizer_history": {"a": 1}}, "its optimizer_history"),
        ({"model": {}, "optimizer_history": [1]}, "its optimizer_history"),
        ({"model": {}, "extra_state": 5}, "its extra_state"),
        ({"model": {}, "last_optimizer_state": [1]}, "its last_optimizer_state"),
        ({"model": {"w": torch.zeros(1).expand(2**40)}}, "is larger than the file"),  # 4 TiB in 4 bytes
    ],
)
def test_a_main_file_whose_entries_are_of_other_kinds(tmp_path, state, said):
    path = written(tmp_path / "c.pt", torch_bytes(state))
    assert said in refused(read_main, path)


def test_an_old_file_that_asks_for_memory(tmp_path):
    """Of before torch 1.6: memory for 68 billion numbers was asked for, and then their data was missing."""
    content = torch_bytes({"model": {"w": torch.zeros(4)}}, _use_new_zipfile_serialization=False)
    large = content.replace(b"K\x04Ntq", b"\x8a\x05\x00\x00\x00\x00\x10Ntq")
    assert large != content
    assert "68,719,476,736 elements" in refused(read_main, written(tmp_path / "c.pt", large))
    assert list(read_main(written(tmp_path / "c.pt", content))["model"]) == ["w"]


def test_an_old_file_with_a_length_of_two_billion(tmp_path):
    """A text in it said to be that long, and memory for it was asked for."""
    content = torch_bytes({"model": {"w": torch.zeros(4)}}, _use_new_zipfile_serialization=False)
    spoilt = content.replace(b"X\x05\x00\x00\x00model", b"X\xff\xff\xff\x7fmodel")
    assert spoilt != content
    assert "damaged or no checkpoint" in refused(read_main, written(tmp_path / "c.pt", spoilt))


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("extra_state", {"train_iterator": 5}),
        ("extra_state", {"train_iterator": {"epoch": torch.zeros(1)}}),
        ("optimizer_history", [{"num_updates": torch.zeros(1), "optimizer_name": 5}]),
        ("cfg", {"model": {"router": ["x"], "decoder_embed_dim": torch.zeros(1)}}),
    ],
)
def test_what_a_checkpoint_does_not_say_is_not_known(tmp_path, entry, value):
    path = written(tmp_path / "c.pt", torch_bytes({"model": {"w": torch.zeros(1)}, entry: value}))
    found = json.loads(json.dumps(facts(path, read_checkpoint(path))))
    assert [found[name] for name in ("update", "epoch", "router", "model_width")] == [None] * 4


@pytest.mark.parametrize("cfg", [5, {"task": ["language_modeling"]}, {}])
def test_a_checkpoint_whose_task_is_no_group_of_options(cfg):
    assert "no cfg" in refused(task_of, {"cfg": cfg}, "a file")


def test_experts_that_are_no_matrices(tmp_path):
    path = written(tmp_path / "c.pt", torch_bytes({"model": {"decoder.layers.0.experts.fc1_weight": torch.zeros(())}}))
    assert facts(path, read_checkpoint(path))["experts"] == 0


@pytest.mark.parametrize(
    "option", [{"hash_feature": 5}, {"hash_length": "x"}, {"multi_hash": "2"}, {"num_experts": [4]}, {"digest": 1.5}]
)
def test_a_checkpoint_whose_table_has_options_of_another_kind(option):
    given = {"hash_feature": "token", "num_experts": 4} | option
    digest = torch.full((32,), given.pop("digest", 7), dtype=torch.float64 if "digest" in option else torch.uint8)
    model = {"decoder.hash_tables.0.expert": torch.zeros(4, 1, dtype=torch.int64)}
    model["decoder.hash_tables.0.dictionary_fingerprint"] = digest
    assert "hash table is damaged (its " in refused(tables_of, model, given, given["num_experts"])


def test_a_checkpoint_whose_options_fairseq_cannot_read(tmp_path):
    from fairseq import checkpoint_utils

    files = run_files("dense")
    state = torch.load(io.BytesIO(files["checkpoint_best.pt"]), weights_only=True)
    state["cfg"]["eval_lm"]["softmax_batch"] = "${x"
    path = written(tmp_path / "c.pt", torch_bytes(state))
    with pytest.raises(SystemExit, match="options that fairseq cannot read"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


def test_an_optimizer_state_that_lacks_an_expert_s_parameter(tmp_path):
    files = run_files("hash")
    state = torch.load(io.BytesIO(files["checkpoint_best.pt"]), weights_only=True)
    for name, content in files.items():
        written(tmp_path / name, content)
    assert facts(tmp_path / "checkpoint_best.pt", read_checkpoint(tmp_path / "checkpoint_best.pt"))["experts"] == 4
    state["last_optimizer_state"]["state"] = {}
    written(tmp_path / "checkpoint_best.pt", torch_bytes(state))
    assert "no optimizer state of decoder.layers" in refused(read_checkpoint, tmp_path / "checkpoint_best.pt")
