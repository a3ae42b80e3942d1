"""Reading experts in mapped files ahead of the layers that need them, so that the disk works while layers compute."""

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from fairseq_hash.core.errors import UserError
from fairseq_hash.moe.kernels.group_sizes import GroupSizes
from fairseq_hash.moe.mapped_experts import MappedExperts

AHEAD = 2
"""Layers whose experts are held at a time: one computes, and the next one is read."""
PIECE = 1 << 17  # bytes; of a longer call the system may leave the rest undone
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
        for offset in range(0, length, PIECE):
            _madvise(start + offset, min(PIECE, length - offset), _WILL_NEED)
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


class ReadAhead:
    """The reader of one forward pass, on a thread that ends with it.

    It reads for the first layers at once, and for another one whenever a layer is done: at most `AHEAD` are held.
    """

    def __init__(self, layers: "Iterable[tuple[MappedExperts, Sequence[int]]]") -> None:
        """Begin to read for the layers, in the order in which they will run; each with the experts it will need."""
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._left = iter(layers)
        self._begun: dict[MappedExperts, tuple[Sequence[int], Future[None]]] = {}
        for _ in range(AHEAD):
            self._begin_next()

    def _begin_next(self) -> None:
        for experts, needed in self._left:
            self._begun[experts] = needed, self._thread.submit(read, experts.in_file(needed))
            return

    def run(self, experts: MappedExperts, rows_RD: Tensor, sizes: "GroupSizes | Sequence[int]") -> Tensor:
        """Apply a layer's experts when they have been read, and let go of them. The layers come in their order.

        Raises:
            UserError: if they cannot be read.
        """
        ahead, reading = self._begun.pop(experts)
        reading.result()
        serving = experts.serving(sizes)
        read(experts.in_file([expert for expert in serving if expert not in ahead]))
        y_RD = experts(rows_RD, sizes)
        let_go(experts.in_file(serving))
        self._begin_next()
        return y_RD
