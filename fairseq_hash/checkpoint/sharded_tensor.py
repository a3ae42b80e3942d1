"""A tensor of all experts that lies in shards: who needs some experts reads these rows."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from fairseq_hash.checkpoint.manifest import Manifest
from fairseq_hash.checkpoint.shards import ShardFile
from fairseq_hash.core.errors import UserError

READERS = 4


class SavedExperts:
    """Stands for a tensor `[E, ...]` in a state dict."""

    def __init__(self, name: str, files: Sequence[ShardFile]) -> None:
        """Take the shards that hold it, in the order of their experts."""
        self.name, self.files = name, files
        first = files[0].tensors[name]
        self.dtype = first.dtype
        self.shape = torch.Size([sum(file.shard.experts for file in files), *first.shape[1:]])
        self._file_of = [file for file in files for _ in file.shard.expert_ids]

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        """Yield every row, in its file's memory. Raises `UserError` for the first that fails its checksum."""
        for expert, file in enumerate(self._file_of):
            yield file.row(self.name, expert)

    def read_into(self, experts: Sequence[int], out: Tensor) -> None:
        """Read the rows of some experts into `out` `[e, ...]`, in their order, on any device and of any type.

        Raises:
            UserError: if a row fails its checksum.
        """

        def read_one(place: int) -> None:
            expert = experts[place]
            out[place].copy_(self._file_of[expert].row(self.name, expert))

        # Checksums take most of the time, and Python lets other threads run meanwhile.
        with ThreadPoolExecutor(READERS) as readers:
            list(readers.map(read_one, range(len(experts))))

    def read(self, experts: Sequence[int], device: torch.device) -> Tensor:
        """Return the rows of some experts, in the type they were saved in."""
        out = torch.empty(len(experts), *self.shape[1:], dtype=self.dtype, device=device)
        self.read_into(experts, out)
        return out

    def read_all(self) -> Tensor:
        """Return all rows, on the CPU."""
        return self.read(range(len(self)), torch.device("cpu"))

    @property
    def parts(self) -> list[Tensor]:
        """The rows of each shard `[e, ...]`, in the file's memory."""
        return [file.tensors[self.name] for file in self.files]

    def verify(self) -> None:
        """Check every row. Raises `UserError` for the first that fails its checksum."""
        for _ in self:
            pass


def open_shards(folder: Path, manifest: Manifest, part: str) -> list[ShardFile]:
    """Open all shards of a part and check size and header of each.

    Raises:
        UserError: if one is missing or another file, or where they are not all experts.
    """
    shards = manifest.part(part)
    ends = [0, *(shard.first + shard.experts for shard in shards)]
    is_gapless = all(shard.first == end and shard.experts > 0 for shard, end in zip(shards, ends, strict=False))
    if shards and not (is_gapless and ends[-1] == manifest.num_experts):
        held = ", ".join(f"{shard.first} to {shard.first + shard.experts - 1}" for shard in shards)
        raise UserError(f"the checkpoint's {part} shards hold experts {held}, not 0 to {manifest.num_experts - 1}")
    return [ShardFile(folder / shard.file, shard) for shard in shards]


def saved_tensors(files: Sequence[ShardFile]) -> dict[str, SavedExperts]:
    """Return what some shards hold, by name.

    Raises:
        UserError: if they do not hold the same tensors.
    """
    kinds = [{name: (one.dtype, one.shape[1:]) for name, one in file.tensors.items()} for file in files]
    for file, kind in zip(files, kinds, strict=True):
        if kind != kinds[0]:
            raise UserError(f"{file.path} holds other tensors than {files[0].path}; use another checkpoint")
    return {name: SavedExperts(name, files) for name in files[0].tensors} if files else {}


def take(value: "Tensor | SavedExperts", experts: Sequence[int]) -> Tensor:
    """Return the rows of some experts: of consecutive ones a tensor's own memory; else a copy, or read to the CPU."""
    if isinstance(value, SavedExperts):
        return value.read(experts, torch.device("cpu"))
    return value[experts.start : experts.stop] if isinstance(experts, range) else value[list(experts)]
