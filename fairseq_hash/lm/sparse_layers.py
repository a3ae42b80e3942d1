"""Sparse layers as the options say: their experts, what picks among them, and how checkpoints reach them."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from fairseq import utils
from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerConfig
from torch import nn

from fairseq_hash.checkpoint.expert_loading import take_own_experts
from fairseq_hash.moe.expert_layers import ExpertLayer
from fairseq_hash.moe.experts import ExpertFeedForward, ExpertStack, GatedFeedForward
from fairseq_hash.moe.hash_weights import HashWeights
from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.mapped_experts import MappedExperts
from fairseq_hash.moe.routers import RouterSettings, router_class
from fairseq_hash.moe.token_dispatcher import TokenDispatcher
from fairseq_hash.options.sparse_options import SparseOptions
from fairseq_hash.parallel.groups import Alone, mark_experts


@dataclass(frozen=True)
class Place:
    """Where a sparse layer stands: the number of its decoder layer, its router, and its hash route where it has one.

    `vocabulary` is V, the symbols of the tokens that it gets.
    """

    number: int
    router: str
    hash_route: "int | None" = None
    vocabulary: int = 0


def build_experts(
    options: SparseOptions,
    cfg: TransformerConfig,
    ids: Sequence[int],
    key: "tuple[int | str, ...]",
    segments: int = 1,
    first: "tuple[nn.Linear, nn.Linear] | None" = None,
) -> nn.Module:
    """Build the experts `ids`; `key` is of their random numbers, `first` the linear layers that expert 0 starts as."""
    width, hidden = cfg.decoder.embed_dim, cfg.decoder.ffn_embed_dim
    dropout = options.expert_dropout
    if dropout is None:
        dropout = cfg.activation_dropout or cfg.relu_dropout or 0.0  # as fairseq's own layers choose it
    if options.expert_form == "swiglu":
        return GatedFeedForward(ids, width, hidden, options.swiglu_limit, dropout, key, options.recompute_hidden)
    activation = utils.get_activation_fn(cfg.activation_fn)
    if options.sparse_placement == "insert":
        return ExpertStack(
            ids, options.expert_sublayers, width, hidden, activation, dropout, key[0], options.recompute_hidden
        )
    return ExpertFeedForward(ids, width, hidden, activation, dropout, key, first, segments, options.recompute_hidden)


def build_sparse_layer(
    options: SparseOptions,
    cfg: TransformerConfig,
    dispatcher: TokenDispatcher,
    place: Place,
    first: "tuple[nn.Linear, nn.Linear] | None" = None,
) -> SparseLayer:
    """Build router and experts of a sparse layer; `first` are the dense FFN's two linear layers."""
    parallel = dispatcher.parallel
    is_hash = place.hash_route is not None
    segments = options.multi_hash if is_hash else 1
    with torch.device("meta") if options.map_experts else contextlib.nullcontext():
        experts = build_experts(options, cfg, parallel.expert_ids, (place.number,), segments, first)
    shapes = {f"experts.{name}": parameter.shape for name, parameter in experts.named_parameters()}
    if options.map_experts:
        experts = MappedExperts(experts)
    router = hash_weights = None
    if not is_hash:
        width, vocabulary = cfg.decoder.embed_dim, place.vocabulary
        settings = RouterSettings(width, options.num_experts, place.number, parallel, options, vocabulary)
        router = router_class(place.router).build(settings)
    elif options.hash_weights == "learned":
        hash_weights = HashWeights(cfg.decoder.embed_dim, options.num_experts, options.hash_score, options.hash_scale)
    layer = SparseLayer(
        router,
        experts,
        dispatcher,
        options.capacity_factor,
        options.eval_capacity_factor,
        hash_route=place.hash_route,
        hash_weights=hash_weights,
        segments=segments,
        top_k=options.experts_per_token if is_hash else 1,
        shared=build_experts(options, cfg, [0], ("shared", place.number)) if options.shared_expert else None,
        norm=nn.LayerNorm(cfg.decoder.embed_dim) if options.expert_layer_norm else None,
        drops_randomly=options.drop_priority == "random",
    )
    share_experts(layer, shapes)
    return layer


def share_experts(layer: ExpertLayer, shapes: Mapping[str, torch.Size]) -> None:
    """Make a layer load its own experts, whose parameters have these shapes, and keep them apart from all the rest."""
    take_own_experts(layer, layer.parallel, shapes)
    if layer.parallel.is_shared:
        # Where fully sharded data parallel wraps the layer: it shards what all ranks have, and leaves these alone.
        alone = {"process_group": Alone(), "process_group_reduce_scatter": Alone()}
        layer.experts = fsdp_wrap(layer.experts, **alone)
        mark_experts(layer.experts)
