"""A pretended GPU, for tests with a build of torch for CPUs: its tensors have shape, type and device, and no values.

Under `pretend`, torch's `FakeTensorMode` raises where devices mix and where the host reads a value. What it lets pass
and a GPU waits for raises `Wait`. The waits that are intended are given to `pretend`, each with what the host reads.

The device is one of two:

- `cuda`, forward only. A CPU build has no guard for this device ("PyTorch is not linked with support for cuda
  devices"), so nothing there can have a gradient, and indexing and `copy_` are made of torch's operations without one.
- `meta`, forward and backward: it says of itself that it is a GPU (`is_cuda`). Autocast does not know it, and is left
  out.
"""

import contextlib
import functools
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fairseq_hash.moe.kernels import grouped_mm

aten = torch.ops.aten

CONDITION, PLACES, MASK, EVENT = "a condition", "nonzero", "a choice by a mask", "an event"
"""Waits. An event follows a copy to pinned memory."""


class Wait(AssertionError):
    """The host waits for the device, where nothing says that it may."""


@contextlib.contextmanager
def pretend(device, *waits):
    """Make `device`, cuda or meta, a pretended GPU.

    Args:
        device: its name.
        waits: the waits that are intended, in their order, each a pair of its kind and what the host learns: the value
            of a condition, the number of places or rows that are left, after an event the sum of each list of sizes.
    """
    gpu = _Gpu(device, list(waits))
    with contextlib.ExitStack() as stack:
        for owner, name, value in gpu.patches():
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_Copies(device))
        yield
    assert not gpu.waits, f"these waits did not happen: {gpu.waits}"


def moved(module, device, dtype):
    """Return a module on a pretended GPU, with floating tensors of another type; values are lost."""

    def empty(tensor):
        wanted = dtype if tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=wanted, device=device)

    made = {}  # parameters may be shared
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = nn.Parameter(empty(parameter), requires_grad=device == "meta")
                part._parameters[name] = made[parameter]
        # fairseq keeps some tensors as plain attributes, and moves them when they are first used.
        for tensors in (part._buffers, vars(part)):
            tensors.update({name: empty(tensor) for name, tensor in tensors.items() if isinstance(tensor, Tensor)})
    return module


class _Gpu:
    """What the host does with the device, in place of what torch does."""

    def __init__(self, device, waits):
        self.device = device
        self.waits = waits
        self.total = None

    def patches(self):
        """Yield what to replace: owner, name and value."""
        for name, value in {
            "is_cuda": property(self._has),
            "copy_": lambda to, source, non_blocking=False: aten.copy_(to, source, non_blocking),
            "tolist": lambda tensor: self._sizes(tensor),
            "new_tensor": lambda tensor, data: self._new(torch.tensor, True, data, device=tensor.device),
            "nonzero": lambda tensor: tensor.new_empty(self._wait(PLACES), tensor.dim(), dtype=torch.int64),
            "__bool__": lambda tensor: self._wait(CONDITION),
            "__getitem__": lambda tensor, index: self._item(tensor, index),
            "__setitem__": lambda tensor, index, value: self._set(tensor, index, value),
        }.items():
            yield FakeTensor, name, value
        # Pinned memory and events need a driver: here a tensor is marked as pinned, and an event only counts.
        for name in ("tensor", "as_tensor", "empty"):
            yield torch, name, functools.partial(self._new, getattr(torch, name), name != "empty")
        yield torch.cuda, "Event", self._event
        yield torch.cuda, "is_current_stream_capturing", lambda: False
        # It tries a product on the device and looks at the values.
        yield grouped_mm, "_is_right", lambda *_: True
        if self.device == "meta":
            yield torch, "is_autocast_enabled", lambda *_: False
            yield torch, "autocast", lambda *_, **__: contextlib.nullcontext()

    def _has(self, tensor):
        return tensor.device.type == self.device

    def _wait(self, kind):
        """Return what the host learns from a wait of this kind."""
        if not self.waits or self.waits[0][0] != kind:
            raise Wait(f"a wait for the device: {kind}")
        return self.waits.pop(0)[1]

    def _event(self):
        event = mock.Mock(spec=["record", "synchronize"])
        event.synchronize.side_effect = self._synchronize
        return event

    def _synchronize(self):
        self.total = self._wait(EVENT)

    def _sizes(self, tensor):
        """Return the sizes that a tensor on the host holds: about equal, and zero for the last of several."""
        if self.total is None or self._has(tensor):
            raise Wait("numbers are read of which no event says that they have arrived")
        others = max(len(tensor) - 1, 1)
        share, rest = divmod(self.total, others)
        return [share + (place < rest) for place in range(others)] + [0] * (len(tensor) - others)

    def _new(self, make, copies, *args, pin_memory=False, **more):
        if copies and torch.device(more.get("device") or "cpu").type == self.device:
            raise Wait("numbers are copied to the device")
        tensor = make(*args, **more)
        if pin_memory:
            tensor.is_marked = True
        return tensor

    def _item(self, tensor, index):
        """Return `tensor[index]`."""
        dim = 0
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, int):
                tensor = tensor.select(dim, part)
                continue
            if isinstance(part, slice):
                tensor = aten.slice(tensor, dim, *part.indices(tensor.shape[dim]))
            elif part is None:
                tensor = tensor.unsqueeze(dim)
            elif not isinstance(part, Tensor) or part.device != tensor.device:
                raise Wait(f"an index that is copied to the device: {part}")
            elif part.dtype == torch.bool:
                return tensor.new_empty(self._wait(MASK), *tensor.shape[part.dim() :])
            else:
                tensor = aten.index(tensor, [*[None] * dim, part])
            dim += 1
        return tensor

    def _set(self, tensor, index, value):
        item = self._item(tensor, index)
        item.copy_(value) if isinstance(value, Tensor) else item.fill_(value)


class _Copies(TorchDispatchMode):
    """Copies between host and device: the host waits for all but those of pinned memory that are told not to."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.namespace == "c10d" or function in (aten._to_copy.default, aten.copy_.default):
            tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)]
            on_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
            if function.namespace == "c10d":
                assert not on_host, f"{function} of tensors on the host"
            elif 0 < len(on_host) < len(tensors):
                not_blocking = kwargs.get("non_blocking") or (function is aten.copy_.default and args[2:] == (True,))
                # For meta the package pins nothing: its type is not that of a GPU.
                pinned = self.device == "meta" or all(getattr(tensor, "is_marked", False) for tensor in on_host)
                if not (not_blocking and pinned):
                    raise Wait("a copy between host and device")
        return result
