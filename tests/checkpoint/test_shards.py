"""One shard, and what stands for experts that lie in several: against the safetensors library and plain indexing."""

import errno
import fcntl
import itertools
import os
import re
import tempfile
from pathlib import Path

import pytest
import recorded
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fairseq_hash.checkpoint.convert import merge
from fairseq_hash.checkpoint.directory import PARTIAL_NAME, SHARD_NAME, lock, shard_name
from fairseq_hash.checkpoint.loading import place_in_epoch
from fairseq_hash.checkpoint.mainfile import duplicate
from fairseq_hash.checkpoint.manifest import KEY, Manifest
from fairseq_hash.checkpoint.saving import check_visible
from fairseq_hash.checkpoint.sharded_tensor import open_shards, saved_tensors
from fairseq_hash.checkpoint.shards import Shard, ShardFile, write_shard
from fairseq_hash.core.errors import UserError
from fairseq_hash.moe.layer import SparseLayer

TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
ABOUT = {"save": "00000000", "update": 7}


def made(dtype, shape):
    """Return a tensor of a type, with values that name their place."""
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


def manifest_of(shards, experts):
    """Return a manifest of some shards."""
    return Manifest("00000000", 7, experts, "hash", "", None, shards=tuple(shards))


def spoiled(**change):
    """Return a main file's state whose manifest says something else."""
    plain = manifest_of([Shard("experts/a.safetensors", "weights", 0, 2, 100, "0" * 64)], 2).to_plain()
    return {KEY: {key: value for key, value in (plain | change).items() if value is not ...}}


def test_a_whole_manifest_is_read_back():
    manifest = manifest_of([Shard("experts/a.safetensors", "weights", 0, 2, 100, "0" * 64)], 2)
    assert Manifest.of(spoiled(), "m.pt") == manifest
    assert Manifest.of({}, "m.pt") is Manifest.of({KEY: "mine"}, "m.pt") is None


@pytest.mark.parametrize("field", ["format", "update", "num_experts", "router", "dictionary_fingerprint", "shards"])
@pytest.mark.parametrize("value", [..., None, [], 3.5, [{"file": "a"}], [3], {"x": 1}])
def test_a_damaged_manifest_is_one_line(field, value):
    """Fields that are missing, of another type, or half there, whichever they are."""
    if (field, value) == ("shards", []):
        return  # a dense model has none
    with pytest.raises(UserError, match=r"^m.pt has (a damaged manifest \(.*\); use another|format .*; this version)"):
        Manifest.of(spoiled(**{field: value}), "m.pt")
    with pytest.raises(UserError, match="has a damaged manifest"):
        Manifest.of(spoiled(unknown=1), "m.pt")


@pytest.mark.parametrize("file", ["/etc/passwd", "../other/experts/a.safetensors", "experts/../../a", 3, None])
def test_shards_are_below_the_folder_of_their_checkpoint(file):
    shard = {"file": file, "part": "weights", "first": 0, "experts": 2, "bytes": 100, "header_sha256": "0" * 64}
    with pytest.raises(UserError, match="m.pt (names the shard .* not below its folder|has a damaged manifest)"):
        Manifest.of(spoiled(shards=[shard]), "m.pt")


@given(
    types=st.lists(TYPES, min_size=1, max_size=4),
    experts=st.integers(1, 9),
    rest=st.lists(st.integers(0, 3), max_size=2),
    cuts=st.sets(st.integers(1, 8), max_size=3),
    data=st.data(),
)
@settings(max_examples=60)
def test_any_experts_of_any_shards_are_read_back(types, experts, rest, cuts, data):
    tensors = {f"tensor {place}/x": made(dtype, (experts, *rest)) for place, dtype in enumerate(types)}
    edges = [0, *sorted(cut for cut in cuts if cut < experts), experts]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = []
        for first, last in itertools.pairwise(edges):
            rows = {key: value[first:last] for key, value in tensors.items()}
            shards.append(write_shard(folder, f"{first}.safetensors", "weights", range(first, last), rows, ABOUT))
            library = load_file(folder / f"{first}.safetensors")
            assert all(torch.equal(library[key], rows[key]) for key in rows)
        saved = saved_tensors(open_shards(folder, manifest_of(reversed(shards), experts), "weights"))
        start = data.draw(st.integers(0, experts - 1))
        wanted = range(start, data.draw(st.integers(start, experts)))
        for key, value in tensors.items():
            assert saved[key].shape == value.shape and saved[key].dtype == value.dtype
            assert torch.equal(saved[key].read(wanted, torch.device("cpu")), value[wanted.start : wanted.stop])
            assert torch.equal(torch.cat(saved[key].parts), value)
            other = torch.empty(len(wanted), *rest, dtype=torch.float64)
            saved[key].read_into(wanted, other)
            assert torch.equal(other, value[wanted.start : wanted.stop].double())


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=150)
def test_no_flipped_bit_goes_unnoticed(place, bit):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.safetensors"
        tensors = {"a": made(torch.float32, (3, 5)), "b": made(torch.bfloat16, (3, 2, 2))}
        shard = write_shard(path.parent, path.name, "weights", range(4, 7), tensors, ABOUT)
        content = bytearray(path.read_bytes())
        content[place % len(content)] ^= 1 << bit
        path.write_bytes(content)
        with pytest.raises(UserError, match=re.escape(str(path))):
            list(ShardFile(path, shard).verify())


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fill(file, tensors, metadata, rows):
        file.write(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fairseq_hash.checkpoint.shards.write_safetensors", fill)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path, "x", "weights", range(3), {"a": torch.zeros(3, 2)}, ABOUT)
    assert not list(tmp_path.iterdir())


def test_shards_that_are_not_all_experts_are_refused(tmp_path):
    shard = write_shard(tmp_path, "x", "weights", range(2), {"a": torch.zeros(2, 1)}, ABOUT)
    with pytest.raises(UserError, match=r"weights shards hold experts 0 to 1, not 0 to 2"):
        open_shards(tmp_path, manifest_of([shard], 3), "weights")


def test_names_are_known_as_ours():
    name = shard_name(12, "0123abcd", "optimizer", range(3, 7)).removeprefix("experts/")
    assert SHARD_NAME.fullmatch(name) and PARTIAL_NAME.fullmatch(f".{name}.0123abcd.partial")
    assert PARTIAL_NAME.fullmatch(".checkpoint_best.pt.partial")  # of earlier versions
    assert PARTIAL_NAME.fullmatch(".crash.pt.0123abcd.partial")
    assert not SHARD_NAME.fullmatch("model-00001-of-00002.safetensors")


@given(before=st.integers(1, 9), after=st.integers(1, 9), done=st.integers(0, 50), update_freq=st.integers(1, 4))
def test_the_place_in_an_epoch_is_that_of_the_text(before, after, done, update_freq):
    """Never a batch left out; the same place where the global batch is the same."""
    state = {"epoch": 2, "iterations_in_epoch": done, "num_shards": before}
    place, again = place_in_epoch(state, after)
    assert place["iterations_in_epoch"] * after + again == done * before and 0 <= again < after
    state["iterations_in_epoch"] = done * update_freq * after
    assert place_in_epoch(state, after)[0]["iterations_in_epoch"] == done * update_freq * before
    place = {"iterations_in_epoch": done, "num_shards": after}
    assert place_in_epoch({"iterations_in_epoch": done}, after) == (place, 0)


@pytest.mark.parametrize("placement", ["replace", "insert"])
@pytest.mark.parametrize("router", ["hash", "switch", "base"])
def test_experts_left_in_files_give_the_same_output_to_the_bit(data, tmp_path, router, placement):
    words = ("--router", router, "--num-experts", "4", "--sparse-layers", "0,1", "--sparse-placement", placement)
    words += ("--max-tokens", "48", "--save-dir", str(tmp_path))
    trainer, epoch_itr = recorded.make_trainer(data, words)
    recorded.run(trainer, epoch_itr, 2)
    recorded.checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, 1.0)
    path = str(tmp_path / "checkpoint_last.pt")
    tokens = torch.randint(4, 60, (3, 8), generator=torch.Generator().manual_seed(0))
    plain, outputs, held = str(tmp_path / "plain.pt"), [], []
    merge(Path(path), Path(plain), with_optimizer=False)
    for file, overrides in ((path, {}), (plain, {"map_experts": True}), (path, {"map_experts": True})):
        [model], _, _ = recorded.checkpoint_utils.load_model_ensemble_and_task([file], overrides)
        outputs.append(model.eval()(tokens)[0])
        held.append(sum(parameter.numel() for parameter in model.parameters()))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    layers = [layer for layer in model.modules() if isinstance(layer, SparseLayer)]
    assert held[0] - held[2] == sum(4 * layer.expert_size for layer in layers)
    empty = recorded.build(data, *words, "--map-experts", for_evaluation=True)[2]
    with pytest.raises(UserError, match="need a checkpoint"):
        empty.eval()(tokens)
    with pytest.raises(SystemExit, match="--map-experts is for evaluation"):
        recorded.make_trainer(data, (*words, "--map-experts"))


def test_a_shard_that_only_its_writer_sees_is_refused(tmp_path):
    shard = write_shard(tmp_path, "x", "weights", range(2), {"a": torch.zeros(2, 1)}, ABOUT)
    check_visible(tmp_path, [shard])
    with pytest.raises(UserError, match="was written by another rank and is not here; give a --save-dir on a disc"):
        check_visible(tmp_path / "elsewhere", [shard])


def test_a_disc_without_links_or_locks(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    (tmp_path / "one.pt").write_bytes(b"content")
    duplicate(tmp_path / "one.pt", tmp_path / "two.pt")
    assert (tmp_path / "two.pt").read_bytes() == b"content" and not list(tmp_path.glob(".*"))
    lock(tmp_path)
    assert "training.lock cannot be locked (No locks available): nothing keeps a second training out" in caplog.text


def test_the_state_of_an_optimizer_of_other_tensors_is_refused(data):
    """As one is that --fp16 has flattened on a GPU."""
    words = ("--router", "hash", "--num-experts", "4", "--sparse-layers", "0", "--max-tokens", "48")
    trainer, _ = recorded.make_trainer(data, words)
    with pytest.raises(UserError, match="one of 1 tensors, this training has .*; resume with the options"):
        trainer.optimizer.load_state_dict({"state": {}, "param_groups": [{"params": [0]}]})
