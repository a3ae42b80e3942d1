"""Experts: feed-forward networks stacked in one parameter each, applied to rows grouped by expert.

They know neither tokens nor ranks. Shape suffixes: see `losses`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fairseq_hash.core.errors import UserError
from fairseq_hash.moe.kernels.feed_forward import HiddenLayer, Weights, feed_forward
from fairseq_hash.moe.kernels.group_sizes import GroupSizes
from fairseq_hash.moe.kernels.huge_pages import empty_in_huge_pages
from fairseq_hash.moe.seeding import seeded_generator


class ExpertFeedForward(nn.Module):
    """Feed-forward networks, one for each of `expert_ids`: linear D to F, activation, dropout, linear F to D.

    An expert starts as fairseq's dense FFN would (`nn.Linear`'s default), drawn from a generator of its id: its start
    does not depend on which experts stand beside it. With `first`, two linear layers, expert 0 starts as these: a layer
    of one expert is then the dense layer itself.

    MultiHash (Hash Layers, Roller et al. 2021) cuts the hidden layer into N `segments`, and N hash functions each pick
    the expert that gives one of them: W1 and W2 then consist of pieces of several experts, at the parameters and FLOPs
    of N = 1. To `forward`, segment n of expert e is the group e * N + n, and y is the sum of a token's N rows.

    With `recompute` the backward pass makes the hidden rows anew, in place of keeping them.

    Raises:
        UserError: where the hidden width cannot be cut into that many equal segments.
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
        segments: int = 1,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if segments < 1 or hidden_width % segments:
            allowed = ", ".join(str(n) for n in range(1, hidden_width + 1) if hidden_width % n == 0)
            raise UserError(
                f"the experts' hidden width of {hidden_width} cannot be cut into {segments} equal segments; change the "
                f"width, or use one of {allowed} segments"
            )
        experts = len(expert_ids)
        self.segments = segments
        self.activation = activation
        self.dropout = dropout
        self.recompute = recompute
        self.fc1_weight = nn.Parameter(empty_in_huge_pages((experts, hidden_width, model_width)))
        self.fc1_bias = nn.Parameter(torch.empty(experts, hidden_width))
        self.fc2_weight = nn.Parameter(empty_in_huge_pages((experts, model_width, hidden_width)))
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
                _uniform(weight[place], weight.shape[2], generator)
                _uniform(bias[place], weight.shape[2], generator)
        if first is not None and 0 in expert_ids:
            place = list(expert_ids).index(0)
            for linear, weight, bias in zip(
                first, (self.fc1_weight, self.fc2_weight), (self.fc1_bias, self.fc2_bias), strict=True
            ):
                weight[place] = linear.weight
                bias[place] = linear.bias

    def forward(self, rows_RD: Tensor, sizes: "GroupSizes | Sequence[int]") -> Tensor:
        """Apply each expert to its share of `rows_RD`: `sizes[e]` rows for the e-th of `expert_ids`.

        With N segments, `sizes[e * N + n]` rows for segment n of the e-th expert.
        """
        shape_GFD = (len(self.fc1_weight) * self.segments, -1, rows_RD.shape[1])
        fc2_bias: Tensor = self.fc2_bias
        if self.segments > 1:
            # Each of a token's N rows brings its share of the bias, so that their sum holds one bias: the mean of N.
            # Expanded, not repeated: that gradient is a sum of a fixed order on a GPU, too.
            fc2_bias = (fc2_bias / self.segments).unsqueeze(1).expand(-1, self.segments, -1).flatten(0, 1)
        weights = Weights(self.fc1_weight.view(shape_GFD), self.fc1_bias.view(shape_GFD[:2]), self.fc2_weight, fc2_bias)
        hidden = HiddenLayer(self.activation, self.dropout if self.training else 0.0, self.recompute)
        return feed_forward(rows_RD, weights, hidden, GroupSizes.of(sizes))


class GatedFeedForward(nn.Module):
    """Gated feed-forward networks without biases, one for each of `expert_ids`: down(silu(gate x) * up x).

    GLU Variants Improve Transformer (Shazeer 2020), section 2, equation 6 (SwiGLU), as DeepSeek-V4 has it: before the
    product, silu's argument is cut to at most `limit`, the other factor to between -limit and limit; 0 cuts nothing.
    Gate and up lie in one parameter, gate first: one product in place of two, and the layout of transformers'
    `gate_up_proj`. The start is `nn.Linear`'s, drawn as `ExpertFeedForward` draws.
    """

    def __init__(
        self,
        expert_ids: Sequence[int],
        model_width: int,
        hidden_width: int,
        limit: float,
        dropout: float,
        key: "tuple[int, ...]",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.limit = limit
        self.dropout = dropout
        self.recompute = recompute
        self.gate_up_weight = nn.Parameter(empty_in_huge_pages((len(expert_ids), 2 * hidden_width, model_width)))
        self.down_weight = nn.Parameter(empty_in_huge_pages((len(expert_ids), model_width, hidden_width)))
        if not self.gate_up_weight.is_meta:  # without data, for experts that stay in a file
            for place, expert in enumerate(expert_ids):
                generator = seeded_generator("expert", *key, expert)
                for weight in (self.gate_up_weight, self.down_weight):
                    _uniform(weight[place], weight.shape[2], generator)

    def forward(self, rows_RD: Tensor, sizes: "GroupSizes | Sequence[int]") -> Tensor:
        """Apply each expert to its share of `rows_RD`: `sizes[e]` rows for the e-th of `expert_ids`."""
        weights = Weights(self.gate_up_weight, None, self.down_weight, None)
        hidden = HiddenLayer(self._gate, self.dropout if self.training else 0.0, self.recompute)
        return feed_forward(rows_RD, weights, hidden, GroupSizes.of(sizes))

    def _gate(self, gate_up_MH: Tensor) -> Tensor:
        gate_MF, up_MF = gate_up_MH.chunk(2, dim=1)
        if self.limit:
            gate_MF, up_MF = gate_MF.clamp(max=self.limit), up_MF.clamp(-self.limit, self.limit)
        return F.silu(gate_MF) * up_MF


@torch.no_grad()
def _uniform(tensor: Tensor, inputs: int, generator: torch.Generator) -> None:
    """Draw a weight or a bias of a linear map of so many inputs, as `nn.Linear` does."""
    bound = 1 / math.sqrt(inputs)
    tensor.uniform_(-bound, bound, generator=generator)


class _RowOfExpert(torch.autograd.Function):
    """The vector of each row's expert. Its gradient is a product: added up in fp32 and in a fixed order.

    A GPU's own gradient of a lookup adds row by row in the dtype of the rows: in bfloat16 whatever is smaller than half
    a rounding of the sum so far is lost, and which rows that is differs from run to run.
    """

    @staticmethod
    def forward(ctx: Any, vector_ED: Tensor, expert_R: Tensor) -> Tensor:
        ctx.save_for_backward(expert_R)
        ctx.experts = len(vector_ED)
        return vector_ED.index_select(0, expert_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> "tuple[Tensor, None]":
        (expert_R,) = ctx.saved_tensors
        exact = torch.promote_types(grad_RD.dtype, torch.float32)
        of_expert_ER = torch.arange(ctx.experts, device=expert_R.device).unsqueeze(1) == expert_R
        return (of_expert_ER.to(exact) @ grad_RD.to(exact)).to(grad_RD.dtype), None


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
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.norm_weight = nn.ParameterList(torch.ones(len(expert_ids), model_width) for _ in range(num_sublayers))
        self.norm_bias = nn.ParameterList(torch.zeros(len(expert_ids), model_width) for _ in range(num_sublayers))
        self.feed_forward = nn.ModuleList(
            ExpertFeedForward(
                expert_ids, model_width, hidden_width, activation, dropout, (key, sublayer), recompute=recompute
            )
            for sublayer in range(num_sublayers)
        )
        for name, parameter in self.feed_forward.named_parameters():
            if name.endswith("fc2_weight"):
                nn.init.zeros_(parameter)

    def forward(self, rows_RD: Tensor, sizes: "GroupSizes | Sequence[int]") -> Tensor:
        """Apply each expert's stack to its share of `rows_RD`: `sizes[e]` rows for the e-th expert."""
        sizes = GroupSizes.of(sizes)
        expert_R = torch.arange(len(self.norm_bias[0]), device=rows_RD.device)
        expert_R = expert_R.repeat_interleave(sizes.on(rows_RD.device), output_size=len(rows_RD))
        added_RD = torch.zeros_like(rows_RD)
        for weight_ED, bias_ED, sublayer in zip(self.norm_weight, self.norm_bias, self.feed_forward, strict=True):
            normed_RD = F.layer_norm(rows_RD + added_RD, rows_RD.shape[-1:])
            normed_RD = normed_RD * _RowOfExpert.apply(weight_ED, expert_R) + _RowOfExpert.apply(bias_ED, expert_R)
            added_RD = added_RD + sublayer(normed_RD, sizes)
        return added_RD
