"""The memory of one process by kind, as tensors come and go: at each moment, and where it is largest."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

WEIGHTS, GRADIENTS, OPTIMIZER, BUFFERS, ACTIVATIONS = KINDS = (
    "weights",
    "gradients",
    "optimizer",
    "buffers",
    "activations",
)


class MemoryWatch(TorchDispatchMode):
    """Counts the bytes of all storages that live, those with data and those without.

    A storage is of the kind `activations`, which includes what is there for a moment only, until it is marked.

    Attributes:
        now: bytes by kind.
        peak: the same when their sum was largest since `begin`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = dict.fromkeys(KINDS, 0)
        self.peak = dict(self.now)
        self._kind_of = WeakIdKeyDictionary()  # of a storage: a list of its kind and its bytes

    def mark(self, tensors: Iterable["Tensor | None"], kind: str) -> None:
        """Count tensors as of this kind from now on."""
        for tensor in tensors:
            if tensor is not None:
                entry = self._entry(tensor)
                self.now[entry[0]] -= entry[1]
                self.now[kind] += entry[1]
                entry[0] = kind

    def mark_model(self, module: nn.Module) -> None:
        """Mark weights and buffers, and each gradient as soon as there is one."""
        self.mark(module.parameters(), WEIGHTS)
        self.mark(module.buffers(), BUFFERS)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self.mark([p.grad], GRADIENTS))

    def begin(self) -> None:
        """Forget the peak so far."""
        self.peak = dict(self.now)

    def _entry(self, tensor: Tensor) -> list[Any]:
        storage = tensor.untyped_storage()
        entry = self._kind_of.get(storage)
        if entry is None:
            entry = self._kind_of[storage] = [ACTIVATIONS, storage.nbytes()]
            self.now[ACTIVATIONS] += entry[1]
            weakref.finalize(storage, self._gone, entry).atexit = False
        return entry

    def _gone(self, entry: list[Any]) -> None:
        self.now[entry[0]] -= entry[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what an operation makes."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._entry(leaf)
        if sum(self.now.values()) > sum(self.peak.values()):
            self.peak = dict(self.now)
        return result
