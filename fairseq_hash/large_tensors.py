"""Memory for large tensors on the CPU: in huge pages, and for gradients the same memory in every update.

The gradient of all experts is memory that was just taken from the system, which clears and maps it page by page as it
is written: half a gigabyte in pages of 4 kB takes longer than the matrix products of 16 experts. In pages of 2 MB it
takes a fourth of that, and memory that was never given back takes nothing. Linux gives huge pages to who asks
(`transparent_hugepage/enabled`: `madvise` or `always`); elsewhere nothing changes but the time.
"""

import math
import mmap
import weakref
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LEAST = 2**23
"""Bytes, below which a tensor is not worth the trouble."""
ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)

_free: "defaultdict[int, list[mmap.mmap]]" = defaultdict(list)
"""Memory of gradients that are gone, by its length. As many as lived at one time, which is a training's peak."""


def empty_in_huge_pages(shape: Sequence[int], like: "Tensor | None" = None) -> Tensor:
    """Return an uninitialised tensor of a shape, with dtype and device of `like` or torch's default ones."""
    return _empty(shape, like, keep=False)


def empty_gradient(parameter: Tensor) -> Tensor:
    """Return an uninitialised tensor for the gradient of a parameter.

    Its memory is kept for the next one of this size when the last tensor that uses it is gone (`zero_grad`), as a GPU's
    memory is.
    """
    return _empty(parameter.shape, parameter, keep=True)


def release() -> None:
    """Give the memory that is kept for gradients back to the system."""
    _free.clear()


def _empty(shape: Sequence[int], like: "Tensor | None", keep: bool) -> Tensor:
    if like is None:
        like = torch.empty(0)
    length = math.prod(shape) * like.element_size()
    is_plain = like.device.type == "cpu" and type(like) in (Tensor, torch.nn.Parameter)
    if ADVICE is None or length < LEAST or not is_plain:
        return like.new_empty(shape)
    try:
        memory = _free[length].pop()
    except IndexError:
        memory = _map(length)
    # torch refers to the array as long as there is a tensor with this memory.
    array = np.frombuffer(memory, dtype=np.uint8)
    if keep:
        weakref.finalize(array, _keep, memory).atexit = False
    return torch.from_numpy(array).view(like.dtype).view(*shape)


def _keep(memory: mmap.mmap) -> None:
    _free[len(memory)].append(memory)


def _map(length: int) -> mmap.mmap:
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(ADVICE)
    except OSError:  # a system without huge pages: these are small then
        pass
    return memory
