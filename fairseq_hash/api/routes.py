"""Which experts serve which token, as tables."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from fairseq_hash.hashing.features import OF_TOKENS
from fairseq_hash.lm.sparse_layers import Place
from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.dispatch_plan import DispatchPlan
from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.routing_context import RoutingContext

COLUMNS = ("position", "token", "layer", "router", "choice", "expert", "weight", "dropped")
# A layer's decision for one forward pass.
Decision = tuple[RoutingContext, Assignment, DispatchPlan]


def sparse_layers(model: nn.Module) -> list[tuple[Place, SparseLayer]]:
    """Return the sparse layers of a model in order, each with its place. A dense model has none."""
    places = getattr(model.decoder, "places", {})
    layers = [module for module in model.decoder.modules() if isinstance(module, SparseLayer)]
    return list(zip(places.values(), layers, strict=True))


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[SparseLayer, list[Decision]]]:
    """Yield the routing decisions of each sparse layer, one per forward pass in this context.

    Each router runs once more on the layer's own input; in evaluation its result is the same.
    """
    decisions: dict[SparseLayer, list[Decision]] = {layer: [] for _, layer in sparse_layers(model)}

    def keep(layer: SparseLayer, inputs: tuple[Tensor, RoutingContext]) -> None:
        x_LBD, context = inputs
        assignment, plan, _ = layer.route(context.drop_padding(x_LBD), context)
        decisions[layer].append((context, assignment, plan))

    hooks = [layer.register_forward_pre_hook(keep) for layer in decisions]
    try:
        yield decisions
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def route(model: nn.Module, token_BL: Tensor, dictionary: Dictionary) -> pd.DataFrame:
    """Return the routes of one sequence of token ids `[1, L]`, by position, then layer: see `LanguageModel.routes`."""
    with watched(model) as decisions:
        model(token_BL)
    tables = []
    for place, layer in sparse_layers(model):
        (decision,) = decisions[layer]
        tables.append(_of_layer(place, layer.segments, decision, token_BL[0], dictionary))
    if not tables:
        return pd.DataFrame({name: [] for name in COLUMNS})
    return pd.concat(tables).sort_values(["position", "layer", "choice"], kind="stable", ignore_index=True)


def _of_layer(place: Place, segments: int, decision: Decision, token_L: Tensor, dictionary: Dictionary) -> pd.DataFrame:
    context, assignment, plan = decision
    tokens, choices = assignment.expert_TK.shape
    position_T = torch.arange(len(token_L)) if context.place_T is None else context.place_T.cpu()
    position_C = position_T.repeat_interleave(choices)
    expert_TK, weight_TK = assignment.expert_TK, assignment.weight_TK
    if segments > 1:  # with MultiHash, an expert has a group of rows for each segment
        expert_TK = expert_TK // segments
    dropped_C = torch.ones(tokens * choices, dtype=torch.bool)
    dropped_C[plan.choice_R.cpu()] = False
    token_C = token_L.cpu()[position_C].tolist()
    listed_TK = torch.ones(tokens, choices, dtype=torch.bool)
    if assignment.order_C is not None:
        listed_TK = torch.zeros(tokens * choices, dtype=torch.bool).index_fill_(0, assignment.order_C.cpu(), True)
        listed_TK = listed_TK.view(tokens, choices)
        listed_TK[:, 0] |= ~listed_TK.any(dim=1)  # a token without a choice: the expert that it suits best
    table = pd.DataFrame(
        {
            "position": position_C.numpy(),
            "token": [dictionary[token] for token in token_C],
            "layer": place.number,
            "router": place.router,
            "choice": torch.arange(choices).repeat(tokens).numpy(),
            "expert": expert_TK.flatten().cpu().numpy(),
            "weight": 1.0 if weight_TK is None else weight_TK.float().flatten().cpu().numpy().astype(float),
            "dropped": dropped_C.numpy(),
        }
    )
    return table[listed_TK.flatten().numpy()]


def hash_tables(model: nn.Module, dictionary: Dictionary) -> dict[int, pd.DataFrame]:
    """Return the table of each hash layer: see `LanguageModel.tables`."""
    hashed = [place for place, _ in sparse_layers(model) if place.hash_route is not None]
    return {place.number: _table(model.decoder.hash_tables[place.hash_route], dictionary) for place in hashed}


def _table(table: Any, dictionary: Dictionary) -> pd.DataFrame:
    expert_HK = table.expert.cpu()
    rows, choices = expert_HK.shape
    names: list[str | None] = [None] * rows
    if table.feature.name in (*OF_TOKENS, "word"):  # the rows after those of the dictionary belong to pairs or words
        names[: len(dictionary)] = dictionary.symbols
    return pd.DataFrame(
        {
            "row": torch.arange(rows).repeat_interleave(choices).numpy(),
            "token": [name for name in names for _ in range(choices)],
            "choice": torch.arange(choices).repeat(rows).numpy(),
            "expert": expert_HK.flatten().numpy(),
        }
    )
