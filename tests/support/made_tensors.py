"""What operations make: which tensors of a given size come into being while some code runs."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargeTensors(TorchDispatchMode):
    """Lists the operations that fill memory of so many numbers or more, and the types of what they make."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.operations, self.dtypes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for made in tree_leaves(out):
            is_large = isinstance(made, torch.Tensor) and made.numel() >= self.size
            if is_large and made.untyped_storage().data_ptr() not in given:
                self.operations.append(func.overloadpacket)
                self.dtypes.append(made.dtype)
        return out
