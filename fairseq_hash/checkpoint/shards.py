"""One shard: a safetensors file with some experts' rows of several tensors, and a SHA-256 of each row.

The digests stand in the file's header, and the header's own digest in the manifest of the checkpoint: who reads some
experts checks the header and these rows, and reads nothing else.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fairseq_hash.checkpoint.safetensors_stream import row_bytes, write_safetensors
from fairseq_hash.core.errors import UserError
from fairseq_hash.core.fields import fits
from fairseq_hash.core.files import atomic_write
from fairseq_hash.core.json_text import parse_object

FORMAT = "fairseq_hash experts 1"
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


def _sha256(row: Tensor) -> str:
    return hashlib.sha256(row_bytes(row)).hexdigest()


def write_shard(
    folder: Path, file: str, part: str, experts: range, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
) -> Shard:
    """Write a shard: on disc and whole under its name, or nothing.

    `folder` is that of the main file, and `file` relative to it. `tensors`, `[e, ...]` by name, on any device, have a
    row for each of `experts`. `about` are further facts for the header (JSON).

    Raises:
        OSError: if the file cannot be written.
    """
    digests = {name: [_sha256(row) for row in tensors[name]] for name in sorted(tensors)}
    about = {**about, "part": part, "first": experts.start, "experts": len(experts), "rows_sha256": digests}
    metadata = {"format": FORMAT, "about": json.dumps(about)}
    with atomic_write(folder / file, is_durable=True) as partial, open(partial, "wb") as out:
        header = write_safetensors(out, {name: tensors[name] for name in digests}, metadata, rows=iter)
        size = out.tell()
    return Shard(file, part, experts.start, len(experts), size, hashlib.sha256(header).hexdigest())


class ShardFile:
    """A shard that is open for reading, memory-mapped; its rows stay readable when its name goes.

    Attributes:
        tensors: `[e, ...]` by name, in the file's memory; their checksums have not been looked at.
    """

    def __init__(self, path: Path, shard: Shard) -> None:
        """Open and check size and header.

        Raises:
            UserError: if the file is missing, or is not the one that the manifest means.
        """
        self.path, self.shard = path, shard
        try:
            # The library has no access to the header's bytes, whose digest the manifest knows.
            with open(path, "rb") as file:
                header, size = _read_header(file), os.fstat(file.fileno()).st_size
            if hashlib.sha256(header).hexdigest() != shard.header_sha256:
                raise UserError(f"{path} is not the file that the checkpoint means: {_difference(header)}")
            if size != shard.bytes:
                raise UserError(f"{path} has {size:,} bytes and had {shard.bytes:,} when it was saved: it is damaged")
            with safe_open(path, "pt") as opened:
                self._rows_sha256 = parse_object((opened.metadata() or {})["about"])["rows_sha256"]
                self.tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            self._check_rows()
        except (SafetensorError, KeyError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{path} is damaged or no shard ({type(error).__name__}), and the checkpoint needs it"
            ) from error
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror or error}), and the checkpoint needs it"
            ) from error

    def _check_rows(self) -> None:
        """Raise `UserError` unless every tensor has a row, and a checksum of it, for each expert of the shard."""
        if not fits(self._rows_sha256, dict[str, list[str]]) or self._rows_sha256.keys() != self.tensors.keys():
            raise UserError(f"{self.path} is damaged: it does not have a checksum for each tensor")
        for name, tensor in self.tensors.items():
            if not tensor.dim() or not len(tensor) == len(self._rows_sha256[name]) == self.shard.experts:
                raise UserError(
                    f"{self.path} is damaged: {name} has shape {list(tensor.shape)} and {len(self._rows_sha256[name])} "
                    f"checksums, for {self.shard.experts} experts"
                )

    def row(self, name: str, expert: int) -> Tensor:
        """Return an expert's row of a tensor, in the file's memory.

        Raises:
            UserError: if it fails its checksum.
        """
        place = expert - self.shard.first
        row = self.tensors[name][place]
        if _sha256(row) != self._rows_sha256[name][place]:
            raise UserError(f"{self.path} is damaged: {name} of expert {expert} fails its checksum")
        return row

    def verify(self) -> Iterator[int]:
        """Check every row, and yield the bytes of each.

        Raises:
            UserError: for the first that fails its checksum.
        """
        for name in self.tensors:
            for expert in self.shard.expert_ids:
                yield self.row(name, expert).nbytes


def _read_header(file: BinaryIO) -> bytes:
    length = file.read(8)
    size = int.from_bytes(length, "little")
    return length + (file.read(size) if size <= MOST_HEADER else b"")


def _difference(header: bytes) -> str:
    """Say what a file with another header is."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        about = parse_object(parse_object(header[8:])["__metadata__"]["about"])
        return f"it belongs to save {about['save']} at update {about['update']}"
    return "its header is damaged"
