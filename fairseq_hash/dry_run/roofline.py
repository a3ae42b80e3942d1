"""The time of an update by a roofline: each operation takes as long as its products or its bytes, whichever is longer.

Williams, Waterman and Patterson (2009), Roofline. torch's own estimator (`torch.distributed._tools`) asks a card for
its rates, and has no time for collectives; this one takes both from a `Hardware`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fairseq_hash.dry_run.hardware import Hardware

aten = torch.ops.aten
PRODUCTS, BYTES, CALLS = "products", "memory", "calls"


class Roofline(TorchDispatchMode):
    """Adds up the time of the operations that are called inside, collectives left out.

    Attributes:
        seconds: by what limits an operation: its `products`, or its bytes (`memory`); `calls` is what each operation
            takes beside its work.
        flops: of all matrix products.
    """

    def __init__(self, on: Hardware) -> None:
        super().__init__()
        self.on = on
        self.seconds = dict.fromkeys((PRODUCTS, BYTES, CALLS), 0.0)
        self.flops = 0

    def begin(self) -> None:
        """Begin anew."""
        self.seconds, self.flops = dict.fromkeys(self.seconds, 0.0), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Add the time of an operation."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace != "aten" or func.is_view:
            return result
        given, made = (
            [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)] for value in ((args, kwargs), result)
        )
        if _is_alias(func, given, made):
            return result
        moved = sum(_bytes(tensor) for tensor in given) + sum(_bytes(tensor) for tensor in made)
        products = 0.0
        if flops := _flops(func.overloadpacket, args, kwargs, result):
            self.flops += flops
            dtype = str(made[0].dtype).removeprefix("torch.")
            products = flops / (self.on.flops.get(dtype, self.on.flops["float32"]) * 1e12)
        is_cached = 0 < moved <= self.on.cache
        memory = moved / ((self.on.cached_bandwidth if is_cached else self.on.bandwidth) * 1e9)
        self.seconds[PRODUCTS if products > memory else BYTES] += max(products, memory)
        self.seconds[CALLS] += self.on.call * 1e-6
        return result


def _flops(operation: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the FLOPs of an operation, 0 if it is no product; torch's registry lacks the three that are here."""
    if operation is aten._grouped_mm:  # rows by groups of weights, or their gradient
        return int(2 * args[0].numel() * args[1].shape[-1])
    if operation is aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if operation is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    count = flop_registry.get(operation)
    return 0 if count is None else int(count(*args, **kwargs, out_val=result))


def _is_alias(func: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    """Return whether an operation only gives its argument another shape."""
    if func._schema.is_mutable or not given or len(made) != 1:
        return False
    return made[0].untyped_storage() is given[0].untyped_storage()


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor that memory moves: an expanded one has fewer than its shape says."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size() if tensor.numel() else 0
