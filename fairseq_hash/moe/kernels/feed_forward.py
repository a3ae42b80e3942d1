"""Feed-forward networks on rows grouped by expert: by the way that is the fastest for dtype, shape and device."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fairseq_hash.moe.kernels.fused_loop import HiddenLayer, Weights, fused_feed_forward
from fairseq_hash.moe.kernels.group_sizes import GroupSizes
from fairseq_hash.moe.kernels.grouped_mm import grouped_linear, serves
from fairseq_hash.moe.kernels.padded_mm import Layout, padded_linear

__all__ = ["GPU_WAYS", "WAYS", "HiddenLayer", "Weights", "choose_way", "feed_forward"]

GPU_WAYS = {torch.bfloat16: "grouped", torch.float16: "padded", torch.float32: "padded"}
"""The fastest of `WAYS` on a GPU: `benchmarks/layer.py --ways` measures them (benchmarks/results/gpu.md)."""


def feed_forward(rows_RD: Tensor, weights: Weights, hidden: HiddenLayer, sizes: GroupSizes) -> Tensor:
    """Return what `fused_feed_forward` returns.

    The dtype is what a linear layer would have here: half precision under autocast.
    """
    device = rows_RD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows_RD = rows_RD.to(dtype)
        weights = weights.to(dtype)
    return WAYS[choose_way(rows_RD, weights)](rows_RD, weights, hidden, sizes)


def choose_way(rows_RD: Tensor, weights: Weights) -> str:
    """Return which of `WAYS` serves rows and weights of this dtype, shape and device."""
    way = GPU_WAYS.get(rows_RD.dtype, "loop") if rows_RD.is_cuda else "loop"
    if way == "grouped" and not serves(rows_RD, weights.fc1_GHD, weights.fc2_EDF):
        return "loop"
    return way


def loop_feed_forward(rows_RD: Tensor, weights: Weights, hidden: HiddenLayer, sizes: GroupSizes) -> Tensor:
    """Apply `fused_feed_forward`, which waits for the sizes."""
    return fused_feed_forward(rows_RD, weights, hidden, sizes.host)


def grouped_feed_forward(rows_RD: Tensor, weights: Weights, hidden: HiddenLayer, sizes: GroupSizes) -> Tensor:
    """Return the same by two grouped products, with the hidden layer by autograd; it waits for nothing."""
    return _two_maps(
        rows_RD, weights, hidden, lambda rows, weight_GOI, bias_GO: grouped_linear(rows, weight_GOI, bias_GO, sizes)
    )


def padded_feed_forward(rows_RD: Tensor, weights: Weights, hidden: HiddenLayer, sizes: GroupSizes) -> Tensor:
    """Return the same by batched products, with the hidden layer by autograd; it waits for the sizes."""
    layout = Layout.of(sizes, rows_RD)
    return _two_maps(
        rows_RD, weights, hidden, lambda rows, weight_GOI, bias_GO: padded_linear(rows, weight_GOI, bias_GO, layout)
    )


WAYS: "dict[str, Callable[[Tensor, Weights, HiddenLayer, GroupSizes], Tensor]]" = {
    "loop": loop_feed_forward,
    "grouped": grouped_feed_forward,
    "padded": padded_feed_forward,
}


def _two_maps(rows_RD: Tensor, weights: Weights, hidden: HiddenLayer, linear: Callable[..., Tensor]) -> Tensor:
    def hidden_layer(rows_RD: Tensor) -> Tensor:
        before_RH = linear(rows_RD, weights.fc1_GHD, weights.bias1_GH)
        return F.dropout(hidden.function(before_RH), hidden.dropout, hidden.dropout > 0)

    if hidden.recompute and torch.is_grad_enabled():
        # The random state is kept where dropout needs it only: a CUDA graph cannot read it.
        keep_state = hidden.dropout > 0
        hidden_RF = checkpoint(hidden_layer, rows_RD, use_reentrant=False, preserve_rng_state=keep_state)
    else:
        hidden_RF = hidden_layer(rows_RD)
    return linear(hidden_RF, weights.second_of_groups(), weights.bias2_GD)
