"""A safetensors file written row by row: the library's writers take tensors that all lie in CPU memory at once."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

# The format's names of the types that models and their optimizers have.
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 64  # bytes


def size_of(value: Any) -> int:
    """Return the bytes of a tensor, or of what stands for one."""
    return value.shape.numel() * value.dtype.itemsize


def row_bytes(row: Tensor) -> memoryview:
    """Return the bytes of a tensor on any device; those of a contiguous CPU tensor are not copied."""
    return memoryview(row.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_safetensors(
    file: BinaryIO, tensors: Mapping[str, Any], metadata: Mapping[str, str], rows: Callable[[Any], Iterable[Tensor]]
) -> bytes:
    """Write tensors to an open file; return its header.

    `tensors` are on any device, or anything else with `shape` and `dtype`. `rows` returns the tensors that one of them
    consists of; one of these at a time is in memory.
    """
    # Wide types first: every tensor then begins at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, value in ordered:
        end = start + size_of(value)
        entries[name] = {"dtype": TYPES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    file.write(header)
    for _, value in ordered:
        for row in rows(value):
            file.write(row_bytes(row))
    return header
