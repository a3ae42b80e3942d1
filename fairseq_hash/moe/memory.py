"""A memory of n-grams: vectors looked up by hashes of the last tokens, added to the activations through a gate.

Engram (arXiv 2601.07372; its published code is `engram_demo_v1.py` of deepseek-ai/Engram): the looked-up vectors are
projected to a key and a value, and the value is scaled by the sigmoid of the scaled dot product of activation and key,
both normalised. Left out here are the merging of similar tokens, the short convolution behind the gate, and the
branches of hyper-connections; new is that ranks share the rows. Shape suffixes: see `losses`; here also S rows of one
share, J heads, w values of a row, and M = J x w, those of all rows of a token.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fairseq_hash.moe.kernels.huge_pages import empty_again, empty_in_huge_pages
from fairseq_hash.moe.memory_rows import MemoryShape
from fairseq_hash.moe.routing_context import MemoryLookup, RoutingContext
from fairseq_hash.moe.seeding import seeded_generator
from fairseq_hash.moe.token_dispatcher import combine, dispatch
from fairseq_hash.parallel.groups import ExpertParallel

EPSILON = 1e-6  # the least product of two norms


class MemoryTable(nn.Module):
    """This rank's shares of a memory's rows, all heads one after the other: a parameter `[e, S, w]`.

    Rows are drawn from a normal distribution whose deviation is the joined width to the power of -1/2, share by share:
    they do not depend on which shares a rank holds.
    """

    def __init__(self, shape: MemoryShape, number: int, parallel: ExpertParallel) -> None:
        super().__init__()
        sizes = (parallel.local_experts, shape.rows_of_share(parallel.num_experts), shape.head_width)
        self.weight = nn.Parameter(empty_in_huge_pages(sizes))
        if not self.weight.is_meta:
            for rows_Sw, share in zip(self.weight.detach(), parallel.expert_ids, strict=True):
                rows_Sw.normal_(0, shape.joined_width**-0.5, generator=seeded_generator("memory", number, share))

    def forward(self, row_R: Tensor) -> Tensor:
        """Return `[R, w]`: the rows of some numbers (int64), counted through this rank's shares."""
        return _Rows.apply(self.weight, row_R)


class _Rows(torch.autograd.Function):
    """Rows of a table by number, whose gradient is written once and in a fixed order.

    On a CPU its memory is kept from one update to the next, as that of experts is; autograd would take new memory.
    """

    @staticmethod
    def forward(ctx: Any, weight_eSw: Tensor, row_R: Tensor) -> Tensor:
        ctx.save_for_backward(row_R)
        ctx.shape = weight_eSw.shape
        return weight_eSw.flatten(0, 1).index_select(0, row_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Rw: Tensor) -> tuple[Tensor, None]:
        (row_R,) = ctx.saved_tensors
        if grad_Rw.is_cuda:  # sorted: `index_add_` adds up in no fixed order there
            rows = ctx.shape[0] * ctx.shape[1]
            return torch.ops.aten.embedding_dense_backward(grad_Rw, row_R, rows, -1, False).view(ctx.shape), None
        grad_eSw = empty_again(ctx.shape, grad_Rw).zero_()
        grad_eSw.flatten(0, 1).index_add_(0, row_R, grad_Rw)
        return grad_eSw, None


class MemoryLayer(nn.Module):
    """What a memory adds to activations. It starts as nothing: the projection to values starts at zero.

    Ranks that share the rows have to call it equally often, with any number of tokens. To gradients and checkpoints the
    shares are what experts are, and have their name.

    Attributes:
        expert_size: number of parameters of one share.
        active_size: parameters of the rows that one token looks up.
    """

    def __init__(self, shape: MemoryShape, number: int, model_width: int, parallel: ExpertParallel) -> None:
        """Make the memory before decoder layer `number`, of this rank among those that share its rows."""
        super().__init__()
        self.number = number
        self.parallel = parallel
        self.experts: nn.Module = MemoryTable(shape, number, parallel)
        self.key = nn.Parameter(torch.empty(model_width, shape.joined_width))
        self.value = nn.Parameter(torch.zeros(model_width, shape.joined_width))
        self.gain = nn.Parameter(torch.ones(model_width))
        if not self.key.is_meta:
            bound = shape.joined_width**-0.5  # nn.Linear's default
            nn.init.uniform_(self.key, -bound, bound, generator=seeded_generator("memory", number, "key"))
        self.expert_size = shape.rows_of_share(parallel.num_experts) * shape.head_width
        self.active_size = shape.joined_width

    def look_up(self, lookup: MemoryLookup) -> Tensor:
        """Return `[T, M]`: the rows of each token, one after the other."""
        row_Q = lookup.row_TJ.flatten()
        if lookup.under_way is None:
            vector_Qw = self.experts(row_Q)
        else:
            plan = lookup.under_way.plan
            vector_Qw = combine(self.experts(dispatch(row_Q.unsqueeze(1), plan).squeeze(1)), plan, None)
        return vector_Qw.view(len(lookup.row_TJ), self.active_size)

    def forward(self, x_LBD: Tensor, context: RoutingContext) -> Tensor:
        """Return what is added to `x_LBD`, of its shape and dtype; zero at padding."""
        x_TD = context.drop_padding(x_LBD)
        memory_TM = self.look_up(context.memory_lookups[self.number])
        y_TD = self.gate(x_TD, F.linear(memory_TM, self.key)) * F.linear(memory_TM, self.value)
        return context.restore_padding(y_TD, x_LBD.shape)

    def gate(self, x_TD: Tensor, key_TD: Tensor) -> Tensor:
        """Return `[T, 1]`, from 0 to 1: the sigmoid of RMSNorm(x) . RMSNorm(key) / sqrt(D).

        Of the gains of the two norms only the product acts, so there is one.
        """
        norms_T1 = [torch.linalg.vector_norm(v, dim=1, keepdim=True, dtype=torch.float32) for v in (x_TD, key_TD)]
        dot_T1 = (x_TD * self.gain * key_TD).sum(dim=1, keepdim=True, dtype=torch.float32)
        score_T1 = dot_T1 * math.sqrt(x_TD.shape[1]) / (norms_T1[0] * norms_T1[1]).clamp_min(EPSILON)
        return score_T1.sigmoid().to(x_TD.dtype)
