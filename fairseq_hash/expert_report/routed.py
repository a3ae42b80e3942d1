"""What the sparse layers of a model do with a text: choices by token id, drops, and some inputs of each layer."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fairseq_hash.api import LanguageModel
from fairseq_hash.api.route_counts import text_batches
from fairseq_hash.api.routes import sparse_layers
from fairseq_hash.expert_report.overlap import Pairs
from fairseq_hash.lm.sparse_layers import Place
from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.routing_context import RoutingContext

INPUTS = 256  # of each layer, for comparing outputs
SEED = 1  # of which inputs


@dataclass(eq=False)
class RoutedLayer:
    """One sparse layer and what it did.

    Attributes:
        place: its number and its router.
        layer: the layer itself.
        pairs: choices of experts by token id, before dropping; with MultiHash each segment is a choice.
        dropped: choices that found their expert full.
        x_MD: fp32, inputs of the layer at random places of the text, at most `INPUTS`.
    """

    place: Place
    layer: SparseLayer
    pairs: Pairs = field(default_factory=lambda: Pairs.of(*(np.zeros(0, dtype=np.int64),) * 2))
    dropped: int = 0
    x_MD: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def experts(self) -> int:
        """E."""
        return self.layer.parallel.num_experts

    @property
    def load_E(self) -> np.ndarray:
        """int64, choices of each expert."""
        return self.pairs.load_E(self.experts)


@torch.no_grad()
def routed_layers(model: LanguageModel, token_S: np.ndarray, length: int) -> list[RoutedLayer]:
    """Let a model read a text, int64 ids `[S]`, after a start symbol and cut into samples of `length` tokens."""
    layers = [RoutedLayer(place, layer) for place, layer in sparse_layers(model.model)]
    generator = torch.Generator().manual_seed(SEED)
    kept: dict[int, list[Tensor]] = {place: [] for place in range(len(layers))}

    def note(place: int, x_LBD: Tensor, context: RoutingContext) -> None:
        one = layers[place]
        x_TD = context.drop_padding(x_LBD)
        assignment, plan, _ = one.layer.route(x_TD, context)
        expert_C = assignment.expert_TK.flatten() // one.layer.segments
        token_C = context.select(token_BL).repeat_interleave(assignment.expert_TK.shape[1])
        if assignment.order_C is not None:  # not every place is a choice
            expert_C, token_C = expert_C[assignment.order_C], token_C[assignment.order_C]
        one.pairs += Pairs.of(token_C.cpu().numpy(), expert_C.cpu().numpy())
        one.dropped += plan.dropped
        count = -(-INPUTS * len(x_TD) // (len(token_S) + 1))
        chosen = torch.randperm(len(x_TD), generator=generator)[:count].to(x_TD.device)
        kept[place].append(x_TD[chosen].float())

    hooks = [
        one.layer.register_forward_pre_hook(lambda _, inputs, place=place: note(place, *inputs))
        for place, one in enumerate(layers)
    ]
    try:
        for batch in text_batches([np.array([model.start]), token_S], length):
            token_BL = batch.to(model.device)
            model.model(token_BL)
    finally:
        for hook in hooks:
            hook.remove()
    for place, one in enumerate(layers):
        one.x_MD = torch.cat(kept[place])[:INPUTS]
    return layers
