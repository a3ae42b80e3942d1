"""One shard: a safetensors file with some experts' rows of several tensors, and a SHA-256 of each row.

The digests stand in the file's header, and the header's own digest in the manifest of the checkpoint: who reads some
experts checks the header and these rows, and reads nothing else.
"""

import contextlib
import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq_hash.core.errors import UserError

FORMAT = "fairseq_hash experts 1"
# safetensors' names of the types that parameters and an optimizer's state have.
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in TYPES.items()}
ALIGNMENT = 64
MOST_HEADER = 1 << 28  # bytes; a damaged length is not a reason to ask for all memory


@dataclass(frozen=True)
class Shard:
    """What a manifest knows of a shard.

    Attributes:
        file: path, relative to the folder of the main file.
        part: `weights` or `optimizer`.
        first: its first expert.
        experts: the number of its experts, whose ids are consecutive.
        bytes: size of the file.
        header_sha256: SHA-256 of the file's header, hexadecimal digits.
    """

    file: str
    part: str
    first: int
    experts: int
    bytes: int
    header_sha256: str

    @property
    def expert_ids(self) -> range:
        """The experts that the shard holds."""
        return range(self.first, self.first + self.experts)


def row_bytes(row: Tensor) -> np.ndarray:
    """Return the memory of a contiguous CPU tensor as uint8."""
    return row.reshape(-1).view(torch.uint8).numpy()


def write_shard(
    folder: Path, file: str, part: str, experts: range, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
) -> Shard:
    """Write a shard under a temporary name and rename it; where that fails, nothing is left.

    Args:
        folder: that of the main file.
        file: path of the shard, relative to it.
        part: `weights` or `optimizer`.
        experts: ids of the experts, which are the tensors' rows.
        tensors: `[e, ...]` by name, on any device.
        about: further facts for the header (JSON).

    Raises:
        OSError: where the file cannot be written.
    """
    # Wide types first: every row then begins at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    path = folder / file
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as out:
            blank = {name: ["0" * 64] * len(experts) for name in names}
            out.write(_header(part, experts, tensors, names, about, blank))
            digests = {name: [] for name in names}
            for name in names:
                for row in tensors[name].detach():
                    data = row_bytes(row.cpu().contiguous())
                    digests[name].append(hashlib.sha256(data).hexdigest())
                    out.write(data)
            size = out.tell()
            header = _header(part, experts, tensors, names, about, digests)
            out.seek(0)
            out.write(header)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return Shard(file, part, experts.start, len(experts), size, hashlib.sha256(header).hexdigest())


def _header(
    part: str,
    experts: range,
    tensors: Mapping[str, Tensor],
    names: list[str],
    about: Mapping[str, Any],
    digests: Mapping[str, list[str]],
) -> bytes:
    """Return a safetensors header: its length, and JSON that spaces fill up to whole lines of `ALIGNMENT`."""
    about = {**about, "part": part, "first": experts.start, "experts": len(experts), "rows_sha256": digests}
    entries: dict[str, Any] = {"__metadata__": {"format": FORMAT, "about": json.dumps(about)}}
    start = 0
    for name in names:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class ShardFile:
    """A shard that is open for reading; its rows stay readable when its name goes.

    Attributes:
        about: what its header says beside the tensors.
        shapes: `(dtype, shape)` of the tensors by name.
    """

    def __init__(self, path: Path, shard: Shard) -> None:
        """Open and check size and header.

        Raises:
            UserError: where the file is missing, or is not the one that the manifest means.
        """
        self.path, self.shard = path, shard
        try:
            self._file = open(path, "rb")  # open as long as the object lives
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}), and the checkpoint needs it") from error
        header = self._read_header()
        if hashlib.sha256(header).hexdigest() != shard.header_sha256:
            raise UserError(f"{path} is not the file that the checkpoint means: {self._difference(header)}")
        size = os.fstat(self._file.fileno()).st_size
        if size != shard.bytes:
            raise UserError(f"{path} has {size:,} bytes and had {shard.bytes:,} when it was saved: it is damaged")
        entries = json.loads(header[8:])
        self.about = json.loads(entries.pop("__metadata__")["about"])
        self.shapes = {name: (TYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in entries.items()}
        self._starts = {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()}
        self._map: mmap.mmap | None = None

    def _read_header(self) -> bytes:
        length = self._file.read(8)
        size = int.from_bytes(length, "little")
        return length + (self._file.read(size) if size <= MOST_HEADER else b"")

    def _difference(self, header: bytes) -> str:
        """Say what a file with another header is."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            about = json.loads(json.loads(header[8:])["__metadata__"]["about"])
            return f"it belongs to save {about['save']} at update {about['update']}"
        return "its header is damaged"

    def _check(self, name: str, place: int, data: Any) -> None:
        if hashlib.sha256(data).hexdigest() != self.about["rows_sha256"][name][place]:
            raise UserError(f"{self.path} is damaged: {name} of expert {self.shard.first + place} fails its checksum")

    def read_row(self, name: str, expert: int, out: Tensor) -> None:
        """Read an expert's row of a tensor into `out`, a contiguous CPU tensor of its type and size.

        Raises:
            UserError: where the row fails its checksum.
        """
        place = expert - self.shard.first
        data = row_bytes(out)
        view, offset = memoryview(data), self._starts[name] + place * data.nbytes
        done = 0
        while done < data.nbytes:
            count = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if not count:
                break  # shortened since it was opened: the checksum fails
            done += count
        self._check(name, place, data)

    def mapped(self, name: str) -> Tensor:
        """Return a tensor `[e, ...]` that lies in the file, memory-mapped; its checksums are not looked at."""
        if self._map is None:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        dtype, shape = self.shapes[name]
        count = int(np.prod(shape))
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._starts[name]).view(shape)

    def verify(self) -> Iterator[int]:
        """Check every row, and yield the bytes of each.

        Raises:
            UserError: for the first that fails its checksum.
        """
        for name, (dtype, shape) in self.shapes.items():
            row = torch.empty(shape[1:], dtype=dtype)
            for expert in self.shard.expert_ids:
                self.read_row(name, expert, row)
                yield row.nbytes
