"""Memories of n-grams as the options say: each stands before a decoder layer, and is added to its input."""

from typing import Any

from torch import Tensor, nn

from fairseq_hash.lm.sparse_layers import share_experts
from fairseq_hash.moe.memory import MemoryLayer
from fairseq_hash.moe.memory_rows import MemoryShape
from fairseq_hash.moe.routing_context import RoutingContext
from fairseq_hash.parallel.groups import ExpertParallel


class InsertedMemory(nn.Module):
    """A memory between two decoder layers (Engram, arXiv 2601.07372)."""

    def __init__(self, shape: MemoryShape, number: int, model_width: int, parallel: ExpertParallel) -> None:
        """Build the memory before decoder layer `number`; ranks share its rows as they share experts."""
        super().__init__()
        self.memory = MemoryLayer(shape, number, model_width, parallel)
        share_experts(self.memory, {"experts.weight": self.memory.experts.weight.shape})

    def forward(self, x: Tensor, encoder_out: RoutingContext, *args: Any, **kwargs: Any) -> "tuple[Tensor, None, None]":
        """Return x of shape `[L, B, D]`, and None for attention weights and report; `encoder_out` is the context."""
        return x + self.memory(x, encoder_out), None, None
