"""Feed-forward networks on rows grouped by expert: by the way that is the fastest for dtype, shape and device."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fairseq_hash.fused_feed_forward import HiddenLayer, Weights, fused_feed_forward
from fairseq_hash.group_sizes import GroupSizes
from fairseq_hash.grouped_linear import grouped_linear, serves

__all__ = ["HiddenLayer", "Weights", "feed_forward", "grouped_feed_forward"]


def feed_forward(rows_RD: Tensor, weights: Weights, hidden: HiddenLayer, sizes: GroupSizes) -> Tensor:
    """Apply `fused_feed_forward`, or two grouped products on a device where these are faster.

    The dtype is what a linear layer would have here: half precision under autocast.
    """
    device = rows_RD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows_RD = rows_RD.to(dtype)
        weights = weights.to(dtype)
    if serves(rows_RD, weights.fc1_GHD, weights.fc2_EDF):
        return grouped_feed_forward(rows_RD, weights, hidden, sizes)
    return fused_feed_forward(rows_RD, weights, hidden, sizes.host)


def grouped_feed_forward(rows_RD: Tensor, weights: Weights, hidden: HiddenLayer, sizes: GroupSizes) -> Tensor:
    """Return what `fused_feed_forward` returns, by two grouped products, with the hidden layer by autograd."""

    def hidden_layer(rows_RD: Tensor) -> Tensor:
        before_RH = grouped_linear(rows_RD, weights.fc1_GHD, weights.bias1_GH, sizes)
        return F.dropout(hidden.function(before_RH), hidden.dropout, hidden.dropout > 0)

    if hidden.recompute and torch.is_grad_enabled():
        hidden_RF = checkpoint(hidden_layer, rows_RD, use_reentrant=False)
    else:
        hidden_RF = hidden_layer(rows_RD)
    return grouped_linear(hidden_RF, weights.second_of_groups(), weights.bias2_GD, sizes)
