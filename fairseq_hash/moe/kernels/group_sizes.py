"""How many rows each group has: on the host, where a loop needs it, and on the device, where a grouped product does."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class GroupSizes:
    """Sizes of G groups of rows that lie one after the other.

    Made of a tensor on a GPU, they are copied to the host at once but not waited for: `host` waits for the work that
    was queued before the copy, not for what was queued since, and `ends` for nothing. While a CUDA graph is captured
    there is no copy: the sizes of a replay are other ones, and only the device ever knows them.
    """

    def __init__(self, size_G: "Tensor | Sequence[int]") -> None:
        self._size_G: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        if not isinstance(size_G, Tensor):
            self.host = tuple(size_G)
            return
        self._size_G = size_G
        if size_G.is_cuda and not torch.cuda.is_current_stream_capturing():
            self._host_G = torch.empty(size_G.shape, dtype=size_G.dtype, pin_memory=True)
            self._host_G.copy_(size_G, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    @classmethod
    def of(cls, sizes: "GroupSizes | Sequence[int]") -> "GroupSizes":
        """Return sizes that may be plain numbers."""
        return sizes if isinstance(sizes, GroupSizes) else cls(sizes)

    @cached_property
    def host(self) -> tuple[int, ...]:
        """The sizes as numbers."""
        assert self._size_G is not None, "numbers that were given are in `host` already"
        if self._size_G.is_cuda:
            if self._copied is None:
                raise RuntimeError("a CUDA graph cannot hold what needs the groups' sizes on the host: use bfloat16")
            self._copied.synchronize()
            return tuple(self._host_G.tolist())
        return tuple(self._size_G.tolist())

    def on(self, device: torch.device) -> Tensor:
        """Return the sizes (int64, `[G]`) on a device, without waiting for it."""
        if self._size_G is None or not is_same(self._size_G.device, device):
            if len(set(self.host)) == 1:  # nothing to copy, so a CUDA graph can hold it
                self._size_G = torch.full((len(self.host),), self.host[0], dtype=torch.int64, device=device)
            else:
                is_cuda = device.type == "cuda"
                self._size_G = torch.tensor(self.host, pin_memory=is_cuda).to(device, non_blocking=True)
        return self._size_G

    def ends(self, device: torch.device) -> Tensor:
        """Return where each group ends (int32, `[G]`) on a device, without waiting for it."""
        return self.on(device).cumsum(0, dtype=torch.int32)


def is_same(one: torch.device, other: torch.device) -> bool:
    """Return whether two devices are the same; `cuda` without a number is any of them."""
    return one.type == other.type and (None in (one.index, other.index) or one.index == other.index)


def count_groups(group_C: Tensor, groups: int) -> Tensor:
    """Return how often each group stands in `group_C` (int64, from 0 to G - 1): int64 `[G]`, without waiting for it.

    `bincount` waits for a GPU, which has to say first how large the largest is.
    """
    return group_C.new_zeros(groups).scatter_add_(0, group_C, torch.ones_like(group_C))
