"""One linear map a group of rows, with autograd that writes each gradient once. Shape suffixes: see `losses`.

Here G is the number of groups, I and O are the widths of a row before and after, and N is the number of segments.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class GroupedLinear(torch.autograd.Function):
    """One linear map a group: a row of group g becomes `weight[g] @ row + bias[g]`.

    A weight of N times as many columns as a row has holds the maps of N groups side by side: group e * N + n has the
    n-th segment of the columns of `weight[e]`.

    Autograd would give each slice of the weight a gradient of the whole stack, filled with zeros; here the backward
    pass writes each group's gradient once, into its place.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        rows_RI: Tensor,
        weight_EOI: Tensor,
        bias_GO: "Tensor | None",
        rows_per_group: Sequence[int],
    ) -> Tensor:
        """Return `[R, O]` for rows `[R, I]`."""
        ctx.save_for_backward(rows_RI, weight_EOI)
        ctx.rows_per_group = rows_per_group
        out_RO = rows_RI.new_empty(len(rows_RI), weight_EOI.shape[1])
        weights = _of_groups(weight_EOI, rows_RI.shape[1])
        biases = [None] * len(weights) if bias_GO is None else bias_GO
        groups = zip(rows_RI.split(rows_per_group), out_RO.split(rows_per_group), weights, biases, strict=True)
        for rows, out, weight, bias in groups:
            if len(rows) and bias is None:
                torch.mm(rows, weight.t(), out=out)
            elif len(rows):
                torch.addmm(bias, rows, weight.t(), out=out)
        return out_RO

    @staticmethod
    def backward(ctx: FunctionCtx, grad_RO: Tensor) -> "tuple[Tensor | None, ...]":
        """Return the gradients of rows, weight and bias, each where it is asked for."""
        rows_RI, weight_EOI = ctx.saved_tensors
        split = ctx.rows_per_group
        grad_RO = grad_RO.contiguous()
        of_rows, of_weight, of_bias, _ = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows_RI) if of_rows else None
        grad_weight = torch.empty_like(weight_EOI) if of_weight else None
        grad_bias = weight_EOI.new_empty(len(split), weight_EOI.shape[1]) if of_bias else None
        if grad_rows is not None:
            weights = _of_groups(weight_EOI, rows_RI.shape[1])
            for grad, out, weight in zip(grad_RO.split(split), grad_rows.split(split), weights, strict=True):
                if len(grad):
                    torch.mm(grad, weight, out=out)
        if grad_weight is not None:
            outs = _of_groups(grad_weight, rows_RI.shape[1])
            for grad, rows, out in zip(grad_RO.split(split), rows_RI.split(split), outs, strict=True):
                if len(grad):
                    torch.mm(grad.t(), rows, out=out)
                else:
                    out.zero_()
        if grad_bias is not None:
            for grad, out in zip(grad_RO.split(split), grad_bias, strict=True):
                torch.sum(grad, dim=0, out=out)
        return grad_rows, grad_weight, grad_bias, None


def _of_groups(weight_EOI: Tensor, width: int) -> "list[Tensor]":
    """Return each group's `[O, width]` as a view."""
    return [weight_OI for of_expert in weight_EOI for weight_OI in of_expert.split(width, dim=1)]


def grouped_linear(
    rows_RI: Tensor, weight_EOI: Tensor, bias_GO: "Tensor | None", rows_per_group: Sequence[int]
) -> Tensor:
    """Apply `GroupedLinear` in the dtype that a linear layer would have here (half precision under autocast).

    Args:
        rows_RI: rows by group, any floating dtype.
        weight_EOI: `[E, O, I]`, or `[E, O, N * I]` where each holds the maps of N groups.
        bias_GO: one for each group, or None.
        rows_per_group: how many rows each of the E * N groups has; zeros are allowed.

    Returns:
        `[R, O]`.
    """
    device = rows_RI.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows_RI, weight_EOI = rows_RI.to(dtype), weight_EOI.to(dtype)
        bias_GO = None if bias_GO is None else bias_GO.to(dtype)
    return GroupedLinear.apply(rows_RI, weight_EOI, bias_GO, rows_per_group)
