"""The cross-entropy of each token as one step of autograd that goes over chunks of rows.

The logits are the largest tensor of a language model. Here no second one of their size is made but the gradient, in the
logits' type: log-softmax and gradient in fp32 live for a chunk only, and the backward pass makes them anew. Loss and
gradient are those of fairseq's cross-entropy to the last bit. Shape suffixes: N tokens, V pieces of the vocabulary, M
rows of a chunk.
"""

import torch
import torch.nn.functional as F
from fairseq.modules import AdaptiveSoftmax
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

THREAD_CHUNK = 2**20
"""Numbers of a chunk for each thread of a CPU: 4 MB of fp32. From 2**16 to 2**22 one thread is as fast with any; with
several each chunk ends in waiting for the slowest, which on a busy machine takes longer than what a cache would save.
"""

DEVICE_CHUNK = 2**26
"""Numbers of a chunk elsewhere: a quarter of a gigabyte of fp32, so that launches are few."""

IGNORED = -100
"""Class of an ignored token where all others are of class 0."""


def token_cross_entropy(logits_NV: Tensor, target_N: Tensor, ignore_index: int, reduce: bool = True) -> Tensor:
    """Return the sum over tokens of -log softmax(logits)[target] in nats, or `[N]` without `reduce`.

    In fp32, or in float64 for logits of float64. An ignored token adds 0. Nothing waits for the device.

    Args:
        logits_NV: of any floating type; rows are copied, a chunk at a time, where they are not contiguous.
        target_N: int64, each from 0 to V - 1 or `ignore_index`.
    """
    return _TokenCrossEntropy.apply(logits_NV, target_N, ignore_index, reduce)


def rows_of_chunk(logits_NV: Tensor) -> int:
    """Return how many rows a chunk has, at least one."""
    rows, width = logits_NV.shape
    if logits_NV.device.type == "cpu":
        step = max(THREAD_CHUNK // width, 1) * torch.get_num_threads()  # each thread has whole rows
    else:
        step = max(DEVICE_CHUNK // width, 1)
    return max(min(step, rows), 1)


def adaptive_cross_entropy(
    softmax: AdaptiveSoftmax, feature_ND: Tensor, target_N: Tensor, ignore_index: int, reduce: bool = True
) -> Tensor:
    """Return the same as `token_cross_entropy` for fairseq's adaptive softmax (Grave et al. 2017), in fp32.

    -log p(word) is that of its cluster in the head, and of the word in its cluster. Only words of a cluster are
    multiplied with its matrix. fairseq's own `adaptive_loss` leaves out the second word of every rare cluster: it takes
    its place there, 1, for padding.

    Args:
        softmax: the model's, in training or evaluation.
        feature_ND: what it multiplies.
        target_N: int64, each from 0 to V - 1 or `ignore_index`, which is of the head.
    """
    logits, targets = softmax(feature_ND, target_N)
    loss_N = F.cross_entropy(logits[0].float(), targets[0], ignore_index=ignore_index, reduction="none")
    clusters = zip(softmax.cutoff, softmax.cutoff[1:], logits[1:], targets[1:], strict=False)  # the head is none
    for start, end, logits_MC, target_M in clusters:
        if target_M is not None:
            rows_M = ((target_N >= start) & (target_N < end)).nonzero().squeeze(1)
            rare_M = F.cross_entropy(logits_MC.float(), target_M, reduction="none")
            loss_N = loss_N.index_add(0, rows_M, rare_M)
    return loss_N.sum() if reduce else loss_N


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits_NV: Tensor, target_N: Tensor, ignore_index: int, reduce: bool) -> Tensor:
        dtype = torch.promote_types(logits_NV.dtype, torch.float32)
        ignored_N = target_N == ignore_index
        place_N1 = target_N.masked_fill(ignored_N, 0).unsqueeze(1)
        chosen_N1 = logits_NV.new_empty(len(logits_NV), 1, dtype=dtype)  # log softmax(logits)[target]
        step = rows_of_chunk(logits_NV)
        scratch_MV = logits_NV.new_empty(step, logits_NV.shape[1], dtype=dtype)
        chunks = (tensor.split(step) for tensor in (logits_NV, place_N1, chosen_N1))
        for logits_MV, place_M1, chosen_M1 in zip(*chunks, strict=True):
            log_softmax_MV = scratch_MV[: len(logits_MV)]
            torch.log_softmax(logits_MV, 1, dtype=dtype, out=log_softmax_MV)
            torch.gather(log_softmax_MV, 1, place_M1, out=chosen_M1)
        ctx.save_for_backward(logits_NV, place_N1, ignored_N)
        # torch's own loss of the chosen numbers: it adds them up in the order of fairseq's loss, to the same sum.
        class_N = torch.zeros_like(target_N).masked_fill_(ignored_N, IGNORED)
        return F.nll_loss(chosen_N1, class_N, ignore_index=IGNORED, reduction="sum" if reduce else "none")

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> "tuple[Tensor, None, None, None]":
        logits_NV, place_N1, ignored_N = ctx.saved_tensors
        dtype = torch.promote_types(logits_NV.dtype, torch.float32)
        grad_N1 = grad.expand(len(logits_NV)).masked_fill(ignored_N, 0).neg().unsqueeze(1)
        grad_NV = logits_NV.new_empty(logits_NV.shape)
        step = rows_of_chunk(logits_NV)
        scratch_MV, of_loss_MV = logits_NV.new_empty(2, step, logits_NV.shape[1], dtype=dtype)
        chunks = (tensor.split(step) for tensor in (logits_NV, grad_NV, grad_N1, place_N1))
        for logits_MV, grad_MV, grad_M1, place_M1 in zip(*chunks, strict=True):
            log_softmax_MV = scratch_MV[: len(logits_MV)]
            torch.log_softmax(logits_MV, 1, dtype=dtype, out=log_softmax_MV)
            through_MV = of_loss_MV[: len(logits_MV)].zero_().scatter_(1, place_M1, grad_M1)
            # What autograd calls for fairseq's loss: the same numbers to the last bit.
            grad_MV.copy_(torch._log_softmax_backward_data(through_MV, log_softmax_MV, 1, dtype))
        return grad_NV, None, None, None
