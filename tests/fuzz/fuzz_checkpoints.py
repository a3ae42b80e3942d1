"""Readers of checkpoints: main files, manifests and shards."""

import contextlib
import functools
import hashlib
import io
import json
import pickle
from pathlib import Path

import torch
from fairseq import checkpoint_utils
from fuzz_formats import DEPTH, json_tree, pickle_with_command, safetensors_tree, torch_bytes, torch_tree, zip_tree
from fuzz_mutations import Seed, Tree
from fuzz_rounds import Reader
from fuzz_seeds import run_files, symbols

import fairseq_hash
from fairseq_hash.api.loading import task_of
from fairseq_hash.checkpoint.hash_tables import tables_of
from fairseq_hash.checkpoint.inspection import facts, model_options
from fairseq_hash.checkpoint.loading import read_checkpoint
from fairseq_hash.checkpoint.manifest import KEY, Manifest, require_all_experts
from fairseq_hash.checkpoint.sharded_tensor import open_shards
from fairseq_hash.checkpoint.shards import Shard, ShardFile
from fairseq_hash.cli.checkpoint import show_facts
from fairseq_hash.core.errors import UserError
from fairseq_hash.table_tools.embeddings import read_embeddings

fairseq_hash.register()
MAIN = "checkpoint_best.pt"


@functools.cache
def _state(name: str) -> dict:
    return torch.load(io.BytesIO(run_files(name)[MAIN]), weights_only=True)


def shard_seeds() -> list[Seed]:
    """Return shards of weights and of the optimizer, as values and as bytes."""
    files = [content for name in ("hash", "switch") for path, content in run_files(name).items() if "experts/" in path]
    return [{"s.safetensors": safetensors_tree(content)} for content in files] + [{"s.safetensors": files[0]}]


def read_shard(folder: Path) -> None:
    """Open a shard as one that its manifest does not mean, and as one that it means; check all rows."""
    path = folder / "s.safetensors"
    content = path.read_bytes()
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    with contextlib.suppress(UserError):
        ShardFile(path, Shard(path.name, "weights", 0, 2, len(content), "0" * 64))
    digest = hashlib.sha256(header).hexdigest()
    refusals = []
    for first, experts in ((0, 2), (2, 2), (0, 4)):
        try:
            for _ in ShardFile(path, Shard(path.name, "weights", first, experts, len(content), digest)).verify():
                pass
        except UserError as error:
            refusals.append(error)
    if len(refusals) == 3:
        raise refusals[0]


def manifest_seeds() -> list[Seed]:
    """Return manifests of sparse and dense models, of which the shards are there."""
    seeds = []
    for name in ("hash", "switch", "dense"):
        shards = {path: content for path, content in run_files(name).items() if "experts/" in path}
        seeds.append({**shards, "manifest.json": json_tree(_state(name)[KEY])})
    return seeds


def read_manifest(folder: Path) -> None:
    """Read a manifest, compare it with a model, and open its shards."""
    try:
        plain = json.loads((folder / "manifest.json").read_bytes())
    except (ValueError, RecursionError):
        return  # a manifest is no JSON file: it stands in the main file
    if (manifest := Manifest.of({KEY: plain}, "a file")) is not None:
        json.dumps(manifest.to_plain())
        require_all_experts({KEY: plain}, manifest, "a file")
        manifest.check(manifest.num_experts, manifest.dictionary_fingerprint, None)
        for part in ("weights", "optimizer"):
            open_shards(folder, manifest, part)


def main_seeds() -> list[Seed]:
    """Return main files: their values, their archive's members, and their bytes; also of before torch 1.6."""
    seeds: list[Seed] = []
    for name in ("hash", "switch", "dense"):
        files = run_files(name)
        others = {path: content for path, content in files.items() if "experts/" in path}
        seeds.append({MAIN: torch_tree(_state(name)), **others})
        seeds.append({MAIN: _members(files[MAIN]), **others})
        seeds.append({MAIN: files[MAIN], **others})
    seeds.append({MAIN: torch_bytes(_state("dense"), _use_new_zipfile_serialization=False)})
    return seeds


def _members(content: bytes) -> Tree:
    """Return the archive, with the pickle in it as often as everything else."""
    tree = zip_tree(content)
    (pickled,) = (name for name in tree.value if name.endswith("data.pkl"))
    others = {name: member for name, member in tree.value.items() if name != pickled}

    def dump(value: dict) -> bytes:
        return tree.dump({**value["others"], **{name: one for name, one in value.items() if name != "others"}})

    return Tree({pickled: tree.value[pickled], "others": others}, dump)


def main_hostile() -> list[Seed]:
    """Return files that would run a command, that say to be large, and that are nested."""
    tree = zip_tree(torch_bytes({"model": {}}))
    (pickled,) = (name for name in tree.value if name.endswith("data.pkl"))
    in_archive = tree.dump({**tree.value, pickled: pickle_with_command()})
    nested = b"\x80\x02" + b"]" * DEPTH + b"a" * (DEPTH - 1) + b"."
    large = torch_bytes({"model": {"w": torch.zeros(4)}}, _use_new_zipfile_serialization=False)
    large = large.replace(b"K\x04Ntq", b"\x8a\x05\x00\x00\x00\x00\x10Ntq")
    files = [in_archive, tree.dump({**tree.value, pickled: nested}), pickle_with_command(), large]
    return [{MAIN: content} for content in [*files, pickle.dumps({"model": 1}), torch_bytes([1]), b""]]


def read_main_file(folder: Path) -> None:
    """Do what `checkpoint show`, `checkpoint table`, and the first part of loading do with a main file."""
    path = folder / MAIN
    state = read_checkpoint(path, is_checked=False)
    found = facts(path, state)
    json.dumps(found)
    with contextlib.redirect_stdout(io.StringIO()):
        show_facts(found)
    manifest, options = state["model"].manifest, model_options(state)
    tables_of(state["model"], options, manifest.num_experts if manifest else options.get("num_experts", 0))
    task_of(state, path)


def load_main_file(folder: Path) -> None:
    """Do what a training and an evaluation do with a main file, and tables of clusters."""
    path = folder / MAIN
    checkpoint_utils.load_checkpoint_to_cpu(str(path))
    read_embeddings(path, symbols())


READERS = (
    Reader("shard", shard_seeds, read_shard),
    Reader("manifest", manifest_seeds, read_manifest),
    Reader("main file of a checkpoint", main_seeds, read_main_file, main_hostile, share=0.3),
    Reader("checkpoint for training", main_seeds, load_main_file, main_hostile, share=0.1),
)
