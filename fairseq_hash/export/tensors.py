"""Writes safetensors files tensor by tensor and expert by expert, so that memory never holds all weights."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fairseq_hash.checkpoint.safetensors_stream import size_of, write_safetensors
from fairseq_hash.checkpoint.sharded_tensor import SavedExperts

Value = Tensor | SavedExperts


def write_weights(tensors: Mapping[str, Value], folder: Path, shard_size: int) -> None:
    """Write `model.safetensors`, or several files and `model.safetensors.index.json`, as transformers names them.

    Experts in shards are read one at a time. `shard_size` is the most bytes of tensors in one file; a larger tensor has
    a file of its own. Raises `OSError` if a file cannot be written, `UserError` if an expert fails its checksum.
    """
    files = _files(tensors, shard_size)
    if len(files) == 1:
        return _write(folder / "model.safetensors", tensors)
    weight_map = {}
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        _write(folder / file, {name: tensors[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
    total = sum(size_of(value) for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _files(tensors: Mapping[str, Value], shard_size: int) -> list[list[str]]:
    """Return the names that go to each file, in their order."""
    files: list[list[str]] = [[]]
    size = 0
    for name, value in tensors.items():
        if files[-1] and size + size_of(value) > shard_size:
            files.append([])
            size = 0
        files[-1].append(name)
        size += size_of(value)
    return files


def _write(path: Path, tensors: Mapping[str, Value]) -> None:
    with open(path, "wb") as file:
        write_safetensors(file, tensors, {"format": "pt"}, lambda value: [value] if torch.is_tensor(value) else value)
