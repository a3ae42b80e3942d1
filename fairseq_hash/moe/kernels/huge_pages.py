"""Memory for large tensors on the CPU: in huge pages, and the same memory in every update.

The gradient of all experts is memory that was just taken from the system, which clears and maps it page by page as it
is written: half a gigabyte in pages of 4 kB takes longer than the matrix products of 16 experts. In pages of 2 MB it
takes a fourth of that, and memory that was never given back takes nothing. The same holds, in small, for the rows that
a sparse layer makes. Linux gives huge pages to who asks (`transparent_hugepage/enabled`: `madvise` or `always`);
elsewhere nothing changes but the time.
"""

import contextlib
import math
import mmap
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEAST = 2**23
"""Bytes, below which a tensor is not worth the trouble."""
ADVICE: Any = getattr(mmap, "MADV_HUGEPAGE", None)

_lock = threading.RLock()  # reentrant: a finalizer may run while this thread holds it
_free: "OrderedDict[int, list[mmap.mmap]]" = OrderedDict()
"""Memory of tensors that are gone, by its length, the length that was asked for last at the end."""


def _unlock() -> None:
    """Let a forked process have a lock of its own: another thread may have held this one."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_unlock)


def empty_in_huge_pages(shape: Sequence[int], like: "Tensor | None" = None) -> Tensor:
    """Return an uninitialised tensor of a shape, with dtype and device of `like` or torch's default ones."""
    return _empty(shape, torch.empty(0) if like is None else like, keep=False)


def empty_again(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return an uninitialised tensor of a shape, with dtype and device of `like`, for what every update makes anew.

    Its memory is kept for the next one of this size when the last tensor that uses it is gone, as a GPU's memory is.
    Where memory of another size is asked for, as much of what is kept goes back to the system first: all of it together
    is never more than lived at one time.
    """
    return _empty(shape, like, keep=True)


def release() -> None:
    """Give the memory that is kept back to the system."""
    _free.clear()


def _empty(shape: Sequence[int], like: Tensor, keep: bool) -> Tensor:
    length = math.prod(shape) * like.element_size()
    is_plain = like.device.type == "cpu" and type(like) in (Tensor, torch.nn.Parameter)
    if ADVICE is None or length < LEAST or not is_plain:
        return like.new_empty(shape)
    memory = _take(length)
    # torch refers to the array as long as there is a tensor with this memory.
    array = np.frombuffer(memory, dtype=np.uint8)
    if keep:
        weakref.finalize(array, _keep, memory).atexit = False
    return torch.from_numpy(array).view(like.dtype).view(*shape)


def _take(length: int) -> mmap.mmap:
    with _lock:
        if kept := _free.get(length):
            _free.move_to_end(length)
            return kept.pop()
        needed = length
        while needed > 0 and _free:
            oldest, kept = next(iter(_free.items()))
            if kept:
                kept.pop()
                needed -= oldest
            else:
                del _free[oldest]
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without huge pages: these are small then
        memory.madvise(ADVICE)
    return memory


def _keep(memory: mmap.mmap) -> None:
    with _lock:
        _free.setdefault(len(memory), []).append(memory)
