"""One linear map a group of rows as one grouped matrix product: the experts' path on a GPU.

`torch.nn.functional.grouped_mm` takes the groups' ends from the device, so the host waits for nothing. On a GPU it has
a kernel of its own for bfloat16; for other types torch 2.11 has a loop with a wait in it, and `fused_feed_forward` is
the better loop. Shape suffixes: see `losses`; here G groups, rows of width I before and O after.
"""

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_hash.moe.kernels.group_sizes import GroupSizes

logger = logging.getLogger(__name__)

ALIGNMENT = 16
"""Bytes, of which the length of each row has to be a multiple."""


class _GroupBias(torch.autograd.Function):
    """Rows plus the bias of their group, in place; rows as they are without one.

    Either way what comes back as a gradient lies row by row in memory. The grouped product takes no other, and the
    gradient of a sum is one number for all.
    """

    @staticmethod
    def forward(ctx: Any, rows_RO: Tensor, bias_GO: "Tensor | None", sizes: GroupSizes) -> Tensor:
        ctx.sizes = sizes
        ctx.mark_dirty(rows_RO)
        if bias_GO is None:
            return rows_RO
        size_G = sizes.on(rows_RO.device)
        return rows_RO.add_(bias_GO.repeat_interleave(size_G, dim=0, output_size=len(rows_RO)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> "tuple[Tensor, Tensor | None, None]":
        grad_RO, grad_bias = grad_RO.contiguous(), None
        if ctx.needs_input_grad[1]:
            # Sums as a product with ones: added up in fp32 and in a fixed order, as index_add is not. As many rows of
            # ones as the alignment asks for; the first result is as good as any.
            ones_RA = grad_RO.new_ones(len(grad_RO), ALIGNMENT // grad_RO.element_size())
            grad_bias = F.grouped_mm(ones_RA.t(), grad_RO, offs=ctx.sizes.ends(grad_RO.device))[:, 0]
        return grad_RO, grad_bias, None


def grouped_linear(rows_RI: Tensor, weight_GOI: Tensor, bias_GO: "Tensor | None", sizes: GroupSizes) -> Tensor:
    """Return `[R, O]`: a row of group g becomes `weight[g] @ row + bias[g]`.

    Args:
        rows_RI: rows by group, float32, bfloat16 or float16.
        weight_GOI: of the same type.
        bias_GO: of the same type, or None.
        sizes: how many rows each group has; zeros are allowed.
    """
    out_RO = F.grouped_mm(rows_RI, weight_GOI.transpose(1, 2), offs=sizes.ends(rows_RI.device))
    return _GroupBias.apply(out_RO, bias_GO, sizes)


def serves(rows_RI: Tensor, *weights: Tensor) -> bool:
    """Return whether grouped products take rows and weights of this type, shape and device, and are right there."""
    widths = {width for weight in weights for width in weight.shape[1:]}
    aligned = all(width * rows_RI.element_size() % ALIGNMENT == 0 for width in widths)
    return aligned and _is_right(rows_RI.device, rows_RI.dtype)


@functools.cache
def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Try a small product with an empty group, forward and backward, against a loop; say so where it is wrong.

    Kernels differ between GPUs and releases of torch, and an empty group is the case that a kernel forgets.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "grouped products have to be tried before a CUDA graph is captured: run the layer once before"
        )
    sizes = (24, 0, 8)
    generator = torch.Generator(device).manual_seed(1)
    rows, grad = (torch.randn(32, width, generator=generator, device=device).to(dtype) for width in (64, 32))
    weight = torch.randn(3, 32, 64, generator=generator, device=device).to(dtype)
    bias = torch.randn(3, 32, generator=generator, device=device).to(dtype)
    results = []
    for run in (
        lambda rows, weight, bias: grouped_linear(rows, weight, bias, GroupSizes(sizes)),
        lambda rows, weight, bias: torch.cat(
            [F.linear(*group) for group in zip(rows.split(sizes), weight, bias, strict=True)]
        ),
    ):
        inputs = [tensor.clone().requires_grad_() for tensor in (rows, weight, bias)]
        try:
            with torch.enable_grad(), torch.autocast(device.type, enabled=False):
                out = run(*inputs)
                results.append([out.detach(), *torch.autograd.grad(out, inputs, grad)])
        except RuntimeError as error:
            logger.warning("experts run one after the other, as there is no grouped_mm on %s: %s", device, error)
            return False
    right = all(
        torch.allclose(got.float(), want.float(), rtol=2e-2, atol=2e-2 * want.abs().max().item())
        for got, want in zip(*results, strict=True)
    )
    if not right:
        logger.warning("experts run one after the other, as grouped_mm is wrong on %s", device)
    return right
