"""Feed-forward networks on grouped rows as one step of autograd: linear, hidden layer, linear, expert by expert.

An expert's hidden rows are made and used while they are in the cache, forward and backward, and the backward pass
writes each expert's gradients once, into their place: autograd would give each slice of a stack of weights a gradient
of the whole stack, filled with zeros (35 x the time of a dense network at 64 experts). Shape suffixes: see `losses`;
here G is the number of groups, H what a row has before the hidden function and F after it (both the hidden width, or H
twice as much where the function is gated).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_hash.moe.kernels.cpu_threads import for_each_group
from fairseq_hash.moe.kernels.huge_pages import empty_again


@dataclass(frozen=True)
class HiddenLayer:
    """What stands between the two linear maps: a function of each row, then dropout.

    Attributes:
        function: rows `[M, H]` to rows `[M, F]`, each by itself; differentiable.
        dropout: probability; 0 outside training.
        recompute: whether the backward pass makes the rows `[R, H]` anew: one matrix product more, and no memory.
    """

    function: Callable[[Tensor], Tensor]
    dropout: float = 0.0
    recompute: bool = False

    @property
    def is_relu(self) -> bool:
        """Whether what comes out is enough to tell the gradient: then nothing else has to be kept."""
        return self.function in (F.relu, torch.relu)

    def draw_mask(self, rows: int, width: int, like: Tensor) -> "Tensor | None":
        """Return what dropout keeps (bool `[R, F]`), drawn for all experts at once: threads would draw in any order."""
        if not self.dropout:
            return None
        return torch.empty(rows, width, dtype=torch.bool, device=like.device).bernoulli_(1 - self.dropout)

    def forward_(self, before_MH: Tensor, mask_MF: "Tensor | None") -> Tensor:
        """Return `[M, F]`; where ReLU is the function, written over its argument."""
        hidden_MF = before_MH.relu_() if self.is_relu else self.function(before_MH)
        return self._drop(hidden_MF, mask_MF)

    def replay(self, kept_MH: Tensor, mask_MF: "Tensor | None") -> "tuple[Tensor, Callable[[Tensor], Tensor]]":
        """Return `[M, F]` again, and a function of its gradient, which it may write over, to the gradient `[M, H]`."""
        if self.is_relu:  # `forward_` has written what it returned
            scale = 1 / (1 - self.dropout)

            def backward_of_relu(grad_MF: Tensor) -> Tensor:
                torch.ops.aten.threshold_backward.grad_input(grad_MF, kept_MH, 0, grad_input=grad_MF)
                return grad_MF.mul_(scale) if self.dropout else grad_MF

            return kept_MH, backward_of_relu
        with torch.enable_grad():
            before_MH = kept_MH.detach().requires_grad_()
            hidden_MF = self.function(before_MH)

        def backward(grad_MF: Tensor) -> Tensor:
            return torch.autograd.grad(hidden_MF, before_MH, self._drop(grad_MF, mask_MF))[0]

        return self._drop(hidden_MF.detach(), mask_MF), backward

    def _drop(self, value_MF: Tensor, mask_MF: "Tensor | None") -> Tensor:
        if mask_MF is None:
            return value_MF
        dropped_MF = value_MF * mask_MF
        dropped_MF *= 1 / (1 - self.dropout)
        # ReLU's result is kept for the backward pass, with what dropout has made of it.
        return value_MF.copy_(dropped_MF) if self.is_relu else dropped_MF


@dataclass(frozen=True)
class Weights:
    """The two linear maps of all groups.

    `fc2_EDF` of N times as many columns as a hidden row has holds the maps of N groups side by side: group e * N + n
    has the n-th segment of the columns of expert e.
    """

    fc1_GHD: Tensor
    bias1_GH: "Tensor | None"
    fc2_EDF: Tensor
    bias2_GD: "Tensor | None"

    @property
    def width(self) -> int:
        """F, of a row."""
        return self.fc2_EDF.shape[2] * len(self.fc2_EDF) // len(self.fc1_GHD)

    def to(self, dtype: torch.dtype) -> "Weights":
        """Return the same in another type."""
        bias1_GH, bias2_GD = (None if bias is None else bias.to(dtype) for bias in (self.bias1_GH, self.bias2_GD))
        return Weights(self.fc1_GHD.to(dtype), bias1_GH, self.fc2_EDF.to(dtype), bias2_GD)

    def second_of_groups(self) -> Tensor:
        """Return the second map of every group, `[G, D, F]`: a copy where groups are segments of an expert."""
        segments = len(self.fc1_GHD) // len(self.fc2_EDF)
        if segments == 1:
            return self.fc2_EDF
        fc2_EDNF = self.fc2_EDF.unflatten(2, (segments, self.width))
        return fc2_EDNF.transpose(1, 2).reshape(len(self.fc1_GHD), self.fc2_EDF.shape[1], self.width)

    def second(self, of_EDF: Tensor, group: int) -> Tensor:
        """Return a group's part of the second map, or of its gradient, as a view `[D, F]`."""
        segments = len(self.fc1_GHD) // len(self.fc2_EDF)
        if segments == 1:
            return of_EDF[group]
        return of_EDF[group // segments].narrow(1, group % segments * self.width, self.width)

    def before_hidden(self, rows_MD: Tensor, group: int, out: "Tensor | None" = None) -> Tensor:
        """Return `[M, H]`: the first map of a group's rows."""
        return _linear(rows_MD, self.fc1_GHD[group], None if self.bias1_GH is None else self.bias1_GH[group], out)

    def after_hidden(self, hidden_MF: Tensor, group: int, out: Tensor) -> None:
        """Write `[M, D]`: the second map of a group's rows."""
        bias_D = None if self.bias2_GD is None else self.bias2_GD[group]
        _linear(hidden_MF, self.second(self.fc2_EDF, group), bias_D, out)


def _linear(rows: Tensor, weight: Tensor, bias: "Tensor | None", out: "Tensor | None") -> Tensor:
    if bias is None:
        return torch.mm(rows, weight.t(), out=out)
    return torch.addmm(bias, rows, weight.t(), out=out)


def _forward(
    rows_RD: Tensor, weights: Weights, hidden: HiddenLayer, sizes: tuple[int, ...], keep: bool
) -> "tuple[Tensor, Tensor | None, Tensor | None]":
    """Return `[R, D]`; with `keep` also what the backward pass needs: `[R, H]` and dropout's mask."""
    out_RD = empty_again(rows_RD.shape, rows_RD)
    kept_RH = None
    if keep and not hidden.recompute:
        kept_RH = empty_again((len(rows_RD), weights.fc1_GHD.shape[1]), rows_RD)
    mask_RF = hidden.draw_mask(len(rows_RD), weights.width, rows_RD)

    def serve(group: int, first: int, end: int) -> None:
        kept_MH = None if kept_RH is None else kept_RH[first:end]
        before_MH = weights.before_hidden(rows_RD[first:end], group, kept_MH)
        hidden_MF = hidden.forward_(before_MH, None if mask_RF is None else mask_RF[first:end])
        weights.after_hidden(hidden_MF, group, out_RD[first:end])

    for_each_group(serve, sizes, weights.fc1_GHD[0].numel(), rows_RD.device.type == "cpu")
    return out_RD, kept_RH, mask_RF


class FusedFeedForward(torch.autograd.Function):
    """`feed_forward` for autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        fc1_GHD: Tensor,
        bias1_GH: "Tensor | None",
        fc2_EDF: Tensor,
        bias2_GD: "Tensor | None",
        hidden: HiddenLayer,
        sizes: tuple[int, ...],
    ) -> Tensor:
        """Return `[R, D]` for rows `[R, D]`."""
        weights = Weights(fc1_GHD, bias1_GH, fc2_EDF, bias2_GD)
        out_RD, kept_RH, mask_RF = _forward(rows_RD, weights, hidden, sizes, keep=True)
        ctx.save_for_backward(rows_RD, fc1_GHD, bias1_GH, fc2_EDF, kept_RH, mask_RF)
        ctx.hidden, ctx.sizes = hidden, sizes
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> "tuple[Tensor | None, ...]":
        """Return the gradients of rows, weights and biases, each where it is asked for."""
        rows_RD, fc1_GHD, bias1_GH, fc2_EDF, kept_RH, mask_RF = ctx.saved_tensors
        weights = Weights(fc1_GHD, bias1_GH, fc2_EDF, None)
        grad_RD = grad_RD.contiguous()
        of_rows, of_fc1, of_bias1, of_fc2, of_bias2 = ctx.needs_input_grad[:5]
        grad_rows = empty_again(rows_RD.shape, rows_RD) if of_rows else None
        grad_fc1 = empty_again(fc1_GHD.shape, fc1_GHD) if of_fc1 else None
        grad_fc2 = empty_again(fc2_EDF.shape, fc2_EDF) if of_fc2 else None
        grad_bias1 = fc1_GHD.new_empty(fc1_GHD.shape[:2]) if of_bias1 else None
        grad_bias2 = fc1_GHD.new_empty(len(fc1_GHD), fc2_EDF.shape[1]) if of_bias2 else None

        def serve(group: int, first: int, end: int) -> None:
            rows_MD, grad_MD = rows_RD[first:end], grad_RD[first:end]
            if grad_bias2 is not None:
                torch.sum(grad_MD, dim=0, out=grad_bias2[group])
            if kept_RH is None:
                kept_MH = weights.before_hidden(rows_MD, group)
                if ctx.hidden.is_relu:
                    kept_MH = ctx.hidden.forward_(kept_MH, None if mask_RF is None else mask_RF[first:end])
            else:
                kept_MH = kept_RH[first:end]
            hidden_MF, through_hidden = ctx.hidden.replay(kept_MH, None if mask_RF is None else mask_RF[first:end])
            if grad_fc2 is not None:
                torch.mm(grad_MD.t(), hidden_MF, out=weights.second(grad_fc2, group))
            if of_rows or of_fc1 or of_bias1:
                before_MH = through_hidden(grad_MD @ weights.second(fc2_EDF, group))
                if grad_bias1 is not None:
                    torch.sum(before_MH, dim=0, out=grad_bias1[group])
                if grad_fc1 is not None:
                    torch.mm(before_MH.t(), rows_MD, out=grad_fc1[group])
                if grad_rows is not None:
                    torch.mm(before_MH, fc1_GHD[group], out=grad_rows[first:end])

        for_each_group(serve, ctx.sizes, 3 * fc1_GHD[0].numel(), rows_RD.device.type == "cpu")
        for group, size in enumerate(ctx.sizes):
            if size == 0:
                for grad in (grad_fc1, grad_bias1, grad_bias2):
                    if grad is not None:
                        grad[group].zero_()
                if grad_fc2 is not None:
                    weights.second(grad_fc2, group).zero_()
        return grad_rows, grad_fc1, grad_bias1, grad_fc2, grad_bias2, None, None


def fused_feed_forward(rows_RD: Tensor, weights: Weights, hidden: HiddenLayer, sizes: tuple[int, ...]) -> Tensor:
    """Return `[R, D]`: a row of group g becomes fc2[g] hidden(fc1[g] row + bias1[g]) + bias2[g].

    Args:
        rows_RD: rows by group, any floating dtype, that of the weights.
        sizes: how many rows each group has; zeros are allowed.
    """
    tensors = (rows_RD, weights.fc1_GHD, weights.bias1_GH, weights.fc2_EDF, weights.bias2_GD)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return FusedFeedForward.apply(*tensors, hidden, sizes)
    return _forward(rows_RD, weights, hidden, sizes, keep=False)[0]
