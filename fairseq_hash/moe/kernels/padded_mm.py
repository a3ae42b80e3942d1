"""One linear map a group of rows as one batched product: another path on a GPU, where there is no grouped product.

A batched product wants groups of one size. Padded to the largest, 16384 Zipf-distributed tokens in 256 balanced groups
would be 27 times the rows. So the batch takes the first C rows of every group, and what large groups have beyond that
goes by products of their own: there 1.3 times the rows, and 25 such groups. Shape suffixes: see `grouped_linear`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_hash.moe.kernels.group_sizes import GroupSizes

PRODUCT = 256
"""In the time that a group's own products take to start, the batch does about so many rows."""


@dataclass(frozen=True)
class Layout:
    """Which rows the batch takes, and which are beyond it.

    Attributes:
        batch: C.
        slot_R: int64, each row's place in the flattened `[G, C]`; G * C for what is beyond.
        beyond: group, first row and row after the last, where a group has more than C rows.
    """

    batch: int
    slot_R: Tensor
    beyond: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, sizes: GroupSizes, rows_RI: Tensor) -> "Layout":
        """Lay out rows of groups of these sizes, which have to be known on the host."""
        batch, device = batch_rows(sizes.host), rows_RI.device
        size_G, groups = sizes.on(device), len(sizes.host)
        group_R = torch.arange(groups, device=device).repeat_interleave(size_G, output_size=len(rows_RI))
        place_R = torch.arange(len(rows_RI), device=device) - (size_G.cumsum(0) - size_G).index_select(0, group_R)
        slot_R = torch.where(place_R < batch, group_R * batch + place_R, groups * batch)
        beyond, end = [], 0
        for group, size in enumerate(sizes.host):
            end += size
            if size > batch:
                beyond.append((group, end - size + batch, end))
        return cls(batch, slot_R, tuple(beyond))

    def pad(self, rows_RI: Tensor, groups: int) -> Tensor:
        """Return `[G, C, I]`, zero where a group has fewer rows."""
        padded_SI = rows_RI.new_zeros(groups * self.batch + 1, rows_RI.shape[1])
        # All that is beyond goes to the last place, which is then left out.
        return padded_SI.index_copy_(0, self.slot_R, rows_RI)[:-1].view(groups, self.batch, -1)

    def multiply(self, padded_GCI: Tensor, rows_RI: Tensor, weight_GIO: Tensor, bias_GO: "Tensor | None") -> Tensor:
        """Return `[R, O]`: each row times its group's matrix, plus its bias."""
        groups, _, width = weight_GIO.shape
        padded_SO = rows_RI.new_empty(groups * self.batch + 1, width)
        out_GCO = padded_SO[:-1].view(groups, self.batch, width)
        if bias_GO is None:
            torch.bmm(padded_GCI, weight_GIO, out=out_GCO)
        else:
            torch.baddbmm(bias_GO.unsqueeze(1), padded_GCI, weight_GIO, out=out_GCO)
        out_RO = padded_SO.index_select(0, self.slot_R)
        for group, first, end in self.beyond:
            if bias_GO is None:
                torch.mm(rows_RI[first:end], weight_GIO[group], out=out_RO[first:end])
            else:
                torch.addmm(bias_GO[group], rows_RI[first:end], weight_GIO[group], out=out_RO[first:end])
        return out_RO


def batch_rows(sizes: tuple[int, ...]) -> int:
    """Return C, at least 1, by which padding and the products beyond the batch take the least time."""
    costs, larger = [], 0
    for number, size in enumerate(sorted(sizes, reverse=True)):
        costs.append(((len(sizes) - number) * size + larger + number * PRODUCT, size))
        larger += size
    return max(1, min(costs, default=(0, 0))[1])


class _PaddedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RI: Tensor, weight_GOI: Tensor, bias_GO: "Tensor | None", layout: Layout) -> Tensor:
        ctx.save_for_backward(rows_RI, weight_GOI)
        ctx.layout = layout
        return layout.multiply(layout.pad(rows_RI, len(weight_GOI)), rows_RI, weight_GOI.transpose(1, 2), bias_GO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> "tuple[Tensor | None, ...]":
        rows_RI, weight_GOI = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad_GCO = ctx.layout.pad(grad_RO, len(weight_GOI))
        grad_rows = ctx.layout.multiply(grad_GCO, grad_RO, weight_GOI, None) if of_rows else None
        grad_weight = grad_bias = None
        if of_weight:
            grad_weight = torch.bmm(grad_GCO.transpose(1, 2), ctx.layout.pad(rows_RI, len(weight_GOI)))
            for group, first, end in ctx.layout.beyond:
                grad_weight[group].addmm_(grad_RO[first:end].t(), rows_RI[first:end])
        if of_bias:
            grad_bias = grad_GCO.sum(dim=1)
            for group, first, end in ctx.layout.beyond:
                grad_bias[group] += grad_RO[first:end].sum(dim=0)
        return grad_rows, grad_weight, grad_bias, None


def padded_linear(rows_RI: Tensor, weight_GOI: Tensor, bias_GO: "Tensor | None", layout: Layout) -> Tensor:
    """Return what `grouped_linear` returns, for rows of a layout."""
    return _PaddedLinear.apply(rows_RI, weight_GOI, bias_GO, layout)
