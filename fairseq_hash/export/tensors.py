"""Writes safetensors files tensor by tensor and expert by expert, so that memory never holds all weights."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fairseq_hash.checkpoint.sharded_tensor import SavedExperts, take
from fairseq_hash.checkpoint.shards import NAMES, row_bytes

DTYPES = {**NAMES, torch.bool: "BOOL"}
Value = Tensor | SavedExperts


def write_weights(tensors: Mapping[str, Value], folder: Path, shard_size: int) -> None:
    """Write `model.safetensors`, or several files and `model.safetensors.index.json`, as transformers names them.

    Args:
        tensors: by name; experts in shards are read one at a time.
        folder: an existing folder to write to.
        shard_size: most bytes of tensors in one file; a larger tensor has a file of its own.

    Raises:
        OSError: if a file cannot be written.
        UserError: if an expert fails its checksum.
    """
    files = _files(tensors, shard_size)
    if len(files) == 1:
        return _write(folder / "model.safetensors", tensors)
    weight_map = {}
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        _write(folder / file, {name: tensors[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
    total = sum(_bytes(value) for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _files(tensors: Mapping[str, Value], shard_size: int) -> list[list[str]]:
    """Return the names that go to each file, in their order."""
    files: list[list[str]] = [[]]
    size = 0
    for name, value in tensors.items():
        if files[-1] and size + _bytes(value) > shard_size:
            files.append([])
            size = 0
        files[-1].append(name)
        size += _bytes(value)
    return files


def _write(path: Path, tensors: Mapping[str, Value]) -> None:
    """Write one file: the header, which has the offsets of every tensor, then the tensors."""
    # Wide dtypes first, so that every tensor begins at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        value = tensors[name]
        end = start + _bytes(value)
        dtype = DTYPES[value.dtype]
        entries[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [start, end]}
        start = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            _write_rows(file, tensors[name])


def _write_rows(file: BinaryIO, value: Value) -> None:
    for part in _parts(value):
        file.write(row_bytes(part.detach().contiguous()))


def _parts(value: Value) -> Iterator[Tensor]:
    """Yield the parts of a tensor: each expert if it is in shards, else the whole tensor."""
    if isinstance(value, Tensor):
        yield value
        return
    for expert in range(len(value)):
        yield take(value, range(expert, expert + 1))


def _bytes(value: Value) -> int:
    return value.shape.numel() * value.dtype.itemsize
