"""The layers of a model whose parameters ranks may share: sparse layers with experts, memories with shares of rows."""

from torch import nn

from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.memory import MemoryLayer

ExpertLayer = SparseLayer | MemoryLayer


def expert_layers(model: nn.Module) -> dict[str, ExpertLayer]:
    """Return them by name. Each has `experts`, whose parameters are `[e, ...]`, and `parallel`: who shares them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertLayer)}
