"""Experts: feed-forward networks stacked in one parameter each, applied to rows grouped by expert.

They know neither tokens nor ranks. Shape suffixes: see `losses`.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from fairseq_hash.routers import seeded_generator


class GroupedLinear(torch.autograd.Function):
    """One linear map an expert: row r of expert e becomes `weight[e] @ row + bias[e]`.

    Autograd would give each slice `weight[e]` a gradient of the whole stack, filled with zeros; here the backward pass
    writes each expert's gradient once, into its place.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, rows_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor, rows_per_expert: Sequence[int]
    ) -> Tensor:
        """Return `[R, O]` for rows `[R, I]`."""
        ctx.save_for_backward(rows_RI, weight_EOI)
        ctx.rows_per_expert = rows_per_expert
        out_RO = rows_RI.new_empty(len(rows_RI), weight_EOI.shape[1])
        groups = zip(rows_RI.split(rows_per_expert), out_RO.split(rows_per_expert), weight_EOI, bias_EO, strict=True)
        for rows, out, weight, bias in groups:
            if len(rows):
                torch.addmm(bias, rows, weight.t(), out=out)
        return out_RO

    @staticmethod
    def backward(ctx: FunctionCtx, grad_RO: Tensor) -> "tuple[Tensor | None, ...]":
        """Return the gradients of rows, weight and bias."""
        rows_RI, weight_EOI = ctx.saved_tensors
        split = ctx.rows_per_expert
        grad_RO = grad_RO.contiguous()
        grad_rows = torch.empty_like(rows_RI) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight_EOI)
        grad_bias = weight_EOI.new_empty(weight_EOI.shape[:2])
        start = 0
        for expert, count in enumerate(split):
            if count:
                grad = grad_RO[start : start + count]
                torch.mm(grad.t(), rows_RI[start : start + count], out=grad_weight[expert])
                torch.sum(grad, dim=0, out=grad_bias[expert])
                if grad_rows is not None:
                    torch.mm(grad, weight_EOI[expert], out=grad_rows[start : start + count])
                start += count
            else:
                grad_weight[expert].zero_()
                grad_bias[expert].zero_()
        return grad_rows, grad_weight, grad_bias, None


def grouped_linear(rows_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
    """Apply `GroupedLinear` in the dtype that a linear layer would have here (half precision under autocast)."""
    device = rows_RI.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows_RI, weight_EOI, bias_EO = rows_RI.to(dtype), weight_EOI.to(dtype), bias_EO.to(dtype)
    return GroupedLinear.apply(rows_RI, weight_EOI, bias_EO, rows_per_expert)


class ExpertFeedForward(nn.Module):
    """Feed-forward networks, one for each of `expert_ids`: linear D to F, activation, dropout, linear F to D.

    An expert starts as fairseq's dense FFN would (`nn.Linear`'s default), drawn from a generator of its id: its start
    does not depend on which experts stand beside it. With `first`, two linear layers, expert 0 starts as these: a layer
    of one expert is then the dense layer itself.
    """

    def __init__(
        self,
        expert_ids: Sequence[int],
        model_width: int,
        hidden_width: int,
        activation: Callable[[Tensor], Tensor],
        dropout: float,
        key: "tuple[int, ...]",
        first: "tuple[nn.Linear, nn.Linear] | None" = None,
    ) -> None:
        super().__init__()
        experts = len(expert_ids)
        self.activation = activation
        self.dropout = dropout
        self.fc1_weight = nn.Parameter(torch.empty(experts, hidden_width, model_width))
        self.fc1_bias = nn.Parameter(torch.empty(experts, hidden_width))
        self.fc2_weight = nn.Parameter(torch.empty(experts, model_width, hidden_width))
        self.fc2_bias = nn.Parameter(torch.empty(experts, model_width))
        if not self.fc1_weight.is_meta:  # without data, for experts that stay in a file
            self._initialise(expert_ids, key, first)

    @torch.no_grad()
    def _initialise(
        self, expert_ids: Sequence[int], key: "tuple[int, ...]", first: "tuple[nn.Linear, nn.Linear] | None"
    ) -> None:
        for place, expert in enumerate(expert_ids):
            generator = seeded_generator("expert", *key, expert)
            for weight, bias in ((self.fc1_weight, self.fc1_bias), (self.fc2_weight, self.fc2_bias)):
                bound = 1 / math.sqrt(weight.shape[2])
                weight[place].uniform_(-bound, bound, generator=generator)
                bias[place].uniform_(-bound, bound, generator=generator)
        if first is not None and 0 in expert_ids:
            place = list(expert_ids).index(0)
            for linear, weight, bias in zip(
                first, (self.fc1_weight, self.fc2_weight), (self.fc1_bias, self.fc2_bias), strict=True
            ):
                weight[place] = linear.weight
                bias[place] = linear.bias

    def forward(self, rows_RD: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """Apply each expert to its share of `rows_RD`: `rows_per_expert[e]` rows for the e-th of `expert_ids`."""
        hidden_RF = self.activation(grouped_linear(rows_RD, self.fc1_weight, self.fc1_bias, rows_per_expert))
        hidden_RF = F.dropout(hidden_RF, self.dropout, self.training)
        return grouped_linear(hidden_RF, self.fc2_weight, self.fc2_bias, rows_per_expert)


class ExpertStack(nn.Module):
    """Stacks of residual sub-layers x + FFN(LayerNorm(x)), one for each of `expert_ids`; returns what is added to x.

    BASE Layers (Lewis et al. 2021), section 4.1, and the authors' release: the second linear layer's weight starts at
    zero.
    """

    def __init__(
        self,
        expert_ids: Sequence[int],
        num_sublayers: int,
        model_width: int,
        hidden_width: int,
        activation: Callable[[Tensor], Tensor],
        dropout: float,
        key: int,
    ) -> None:
        super().__init__()
        self.norm_weight = nn.ParameterList(torch.ones(len(expert_ids), model_width) for _ in range(num_sublayers))
        self.norm_bias = nn.ParameterList(torch.zeros(len(expert_ids), model_width) for _ in range(num_sublayers))
        self.feed_forward = nn.ModuleList(
            ExpertFeedForward(expert_ids, model_width, hidden_width, activation, dropout, (key, sublayer))
            for sublayer in range(num_sublayers)
        )
        for feed_forward in self.feed_forward:
            nn.init.zeros_(feed_forward.fc2_weight)

    def forward(self, rows_RD: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """Apply each expert's stack to its share of `rows_RD`: `rows_per_expert[e]` rows for the e-th expert."""
        counts_E = torch.tensor(rows_per_expert, pin_memory=rows_RD.is_cuda).to(rows_RD.device, non_blocking=True)
        added_RD = torch.zeros_like(rows_RD)
        for weight_ED, bias_ED, feed_forward in zip(self.norm_weight, self.norm_bias, self.feed_forward, strict=True):
            normed_RD = F.layer_norm(rows_RD + added_RD, rows_RD.shape[-1:])
            weight_RD, bias_RD = (
                p.repeat_interleave(counts_E, dim=0, output_size=len(rows_RD)) for p in (weight_ED, bias_ED)
            )
            added_RD = added_RD + feed_forward(normed_RD * weight_RD + bias_RD, rows_per_expert)
        return added_RD
