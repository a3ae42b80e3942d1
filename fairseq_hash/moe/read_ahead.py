"""Reading experts in mapped files ahead of the layers that need them, so that the disk works while layers compute."""

import ctypes
import errno
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_hash.core.errors import UserError
from fairseq_hash.moe.kernels.group_sizes import GroupSizes
from fairseq_hash.moe.mapped_experts import MappedExperts

CHUNK = 1 << 26
"""Bytes of experts that are read, used and let go of together; at least one expert."""
HELD = 1 << 28
"""Bytes of experts that are held at a time: those that compute and those that are being read. At least two chunks."""
CALL = 1 << 17  # bytes; of a longer call the system may leave the rest undone
_WILL_NEED, _COLD, _POPULATE_READ = 3, 20, 22  # of Linux's madvise; Python's mmap has not all of them

_madvise: "Callable[[int, int, int], int] | None" = None
if sys.platform == "linux":
    _madvise = ctypes.CDLL(None, use_errno=True).madvise
    _madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _pages(rows: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Yield address and length of the pages in which rows lie; rows that touch are one."""
    start = end = 0
    for row in sorted(rows, key=Tensor.data_ptr):
        first = row.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        last = -(-(row.data_ptr() + row.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        if first > end:
            if end:
                yield start, end - start
            start = first
        end = max(end, last)
    if end:
        yield start, end - start


def read(rows: Sequence[Tensor]) -> None:
    """Bring rows of mapped files into memory; elsewhere than on Linux 5.14 and later, do nothing.

    Raises:
        UserError: if they cannot be read any more: a file was cut, or its disk fails. Without this call the system
            kills who touches them.
    """
    if _madvise is None:
        return
    pages = list(_pages(rows))
    for start, length in pages:  # the disk is asked for everything, then we wait
        for offset in range(0, length, CALL):
            _madvise(start + offset, min(CALL, length - offset), _WILL_NEED)
    for start, length in pages:
        while _madvise(start, length, _POPULATE_READ):
            number = ctypes.get_errno()
            if number == errno.EINVAL:  # an older system
                return
            if number not in (errno.EAGAIN, errno.EINTR):
                raise UserError(
                    f"experts cannot be read from the checkpoint's files any more ({os.strerror(number)}): a file was "
                    "cut while it was in use, or its disk fails; check it by fairseq-hash checkpoint verify"
                )


def let_go(rows: Sequence[Tensor]) -> None:
    """Let the system take the memory of these rows first where it needs some; where it needs none, they stay."""
    if _madvise is not None:
        for start, length in _pages(rows):
            _madvise(start, length, _COLD)


@dataclass(frozen=True)
class _Chunk:
    """Experts of a layer that are read together.

    Attributes:
        needed: which of them are read ahead.
        size: their bytes.
        reading: the reading of them.
    """

    needed: frozenset[int]
    size: int
    reading: "Future[None]"


class ReadAhead:
    """The reader of one forward pass, on a thread that ends with it.

    It reads the first chunks of experts at once, and more whenever one has been used: at most `HELD` bytes are held.
    So what is held depends neither on the number of layers nor on the size of one.
    """

    def __init__(self, layers: "Iterable[tuple[MappedExperts, Collection[int]]]") -> None:
        """Begin to read for the layers, in the order in which they will run; each with the experts it will need."""
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._begun: dict[tuple[MappedExperts, int], _Chunk] = {}
        self._left = deque((experts, chunk, needed) for experts, needed in layers for chunk in experts.chunks(CHUNK))
        self._begin()

    def _begin(self) -> None:
        """Begin to read as much as may be held."""
        held = sum(chunk.size for chunk in self._begun.values())
        while self._left:
            experts, chunk, ahead = self._left[0]
            needed = frozenset(chunk).intersection(ahead)
            rows = experts.in_file(sorted(needed))
            size = sum(row.nbytes for row in rows)
            if len(self._begun) >= 2 and held + size > HELD:
                return
            self._left.popleft()
            if needed:
                self._begun[experts, chunk.start] = _Chunk(needed, size, self._thread.submit(read, rows))
                held += size

    def run(self, experts: MappedExperts, rows_RD: Tensor, sizes: "GroupSizes | Sequence[int]") -> Tensor:
        """Apply a layer's experts, chunk by chunk as they have been read, and let go of them. Layers come in order.

        Raises:
            UserError: if they cannot be read.
        """
        size_G, segments, start, outputs = GroupSizes.of(sizes).host, experts.segments, 0, []
        serving = experts.serving(sizes)
        for chunk in experts.chunks(CHUNK):
            of_chunk = [expert for expert in serving if expert in chunk]
            ahead = self._begun.get((experts, chunk.start))
            if ahead is not None:
                ahead.reading.result()
            read(experts.in_file([expert for expert in of_chunk if ahead is None or expert not in ahead.needed]))
            if of_chunk:
                size_g = size_G[chunk.start * segments : chunk.stop * segments]
                end = start + sum(size_g)
                outputs.append(experts(rows_RD[start:end], size_g, chunk))
                start = end
            let_go(experts.in_file(of_chunk))
            self._begun.pop((experts, chunk.start), None)
            self._begin()
        return torch.cat(outputs) if outputs else rows_RD
