"""fairseq's Transformer decoder with sparse layers: where they stand, and how the token ids reach them.

The route of a forward pass is one `RoutingContext`. It goes to the layers through the argument `encoder_out`, which a
decoder-only model leaves empty and which activation checkpointing hands on to the recomputation. Each sparse layer
returns its report as the third output, which fairseq's decoder ignores; a forward hook on the layer puts it into the
context, after any checkpointing, so that the auxiliary losses have gradients.
"""

import contextlib
import functools
import itertools
import logging
from argparse import Namespace
from typing import Any

import torch
from fairseq import utils
from fairseq.data import Dictionary
from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerConfig, TransformerDecoder
from fairseq.modules import FairseqDropout
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import Tensor, nn

from fairseq_hash.base_balance import balance_over
from fairseq_hash.dispatch import PlanUnderWay
from fairseq_hash.errors import UserError
from fairseq_hash.evaluation import is_evaluation
from fairseq_hash.experts import ExpertFeedForward, ExpertStack
from fairseq_hash.hashing import HashTable, build_table, check_table, placeholder_table, table_fingerprint
from fairseq_hash.layer import RoutingContext, SparseLayer
from fairseq_hash.mapped import MappedExperts
from fairseq_hash.options import SparseOptions
from fairseq_hash.parallel import Alone, ExpertParallel, mark_experts
from fairseq_hash.routers import Assignment, BaseRouter, SwitchRouter

logger = logging.getLogger(__name__)


def build_router(options: SparseOptions, model_width: int, parallel: ExpertParallel, number: int) -> "nn.Module | None":
    """Return the router of sparse layer `number`; None for hash layers, whose route the context holds."""
    if options.router == "switch":
        return SwitchRouter(model_width, options.num_experts, options.router_jitter, number)
    if options.router == "base":
        return BaseRouter(model_width, options.num_experts, number, balance_over(options.base_balance, parallel))
    return None


def build_sparse_layer(
    options: SparseOptions,
    cfg: TransformerConfig,
    parallel: ExpertParallel,
    number: int,
    first: "tuple[nn.Linear, nn.Linear] | None" = None,
) -> SparseLayer:
    """Build router and experts of decoder layer `number`; `first` are the dense FFN's two linear layers."""
    width, hidden = cfg.decoder.embed_dim, cfg.decoder.ffn_embed_dim
    activation = utils.get_activation_fn(cfg.activation_fn)
    dropout = options.expert_dropout
    if dropout is None:
        dropout = cfg.activation_dropout or cfg.relu_dropout or 0.0  # as fairseq's own layers choose it
    experts: nn.Module
    ids = parallel.expert_ids
    with torch.device("meta") if options.map_experts else contextlib.nullcontext():
        if options.sparse_placement == "insert":
            experts = ExpertStack(ids, options.expert_sublayers, width, hidden, activation, dropout, number)
        else:
            experts = ExpertFeedForward(ids, width, hidden, activation, dropout, (number,), first)
    if options.map_experts:
        experts = MappedExperts(experts)
    router = build_router(options, width, parallel, number)
    layer = SparseLayer(router, experts, parallel, options.capacity_factor, options.eval_capacity_factor)
    if parallel.is_shared:
        # Where fully sharded data parallel wraps the layer: it shards what all ranks have, and leaves these alone.
        alone = {"process_group": Alone(), "process_group_reduce_scatter": Alone()}
        layer.experts = fsdp_wrap(layer.experts, **alone)
        mark_experts(layer.experts)
    return layer


class SparseDecoderLayer(TransformerDecoderLayerBase):
    """A decoder layer whose FFN is a `SparseLayer`."""

    def __init__(self, cfg: TransformerConfig, options: SparseOptions, parallel: ExpertParallel, number: int) -> None:
        super().__init__(cfg, no_encoder_attn=True)
        # The dense FFN is built first, and becomes expert 0: the random numbers of all other parameters are then those
        # of the dense model with the same seed.
        dense = self._modules.pop("fc1"), self._modules.pop("fc2")
        self.sparse = build_sparse_layer(options, cfg, parallel, number, first=dense)
        # `forward` runs fc1, activation, dropout and fc2 in turn: here fc1 is the whole FFN, and the rest does nothing.
        self.activation_fn = self.fc2
        self.activation_dropout_module = FairseqDropout(0.0)
        self._context: RoutingContext | None = None
        self._report: Tensor | None = None

    def fc1(self, x: Tensor) -> Tensor:
        """The whole sparse FFN."""
        y, self._report = self.sparse(x, self._context)
        return y

    @staticmethod
    def fc2(x: Tensor) -> Tensor:
        """Nothing: `fc1` is the whole FFN."""
        return x

    def forward(
        self, x: Tensor, encoder_out: RoutingContext, *args: Any, **kwargs: Any
    ) -> "tuple[Tensor, Tensor | None, Tensor]":
        """Return x of shape `[L, B, D]`, attention weights or None, and the report; `encoder_out` is the context."""
        # The two attributes hold for this call only: fairseq's forward passes nothing but x to fc1.
        self._context = encoder_out
        try:
            x, attention, _ = super().forward(x, None, *args, **kwargs)
            return x, attention, self._report
        finally:
            self._context = self._report = None


class InsertedLayer(nn.Module):
    """A residual stack of expert sub-layers between two decoder layers (BASE Layers, section 4.1)."""

    def __init__(self, cfg: TransformerConfig, options: SparseOptions, parallel: ExpertParallel, number: int) -> None:
        super().__init__()
        self.sparse = build_sparse_layer(options, cfg, parallel, number)

    def forward(
        self, x: Tensor, encoder_out: RoutingContext, *args: Any, **kwargs: Any
    ) -> "tuple[Tensor, None, Tensor]":
        """Return x of shape `[L, B, D]`, None for attention weights, and the report; `encoder_out` is the context."""
        y, report = self.sparse(x, encoder_out)
        return x + y, None, report


class HashTableBuffers(nn.Module):
    """A hash table as buffers of the model: saved with it, and checked against the dictionary when loaded."""

    def __init__(self, table: HashTable) -> None:
        super().__init__()
        self.num_experts = table.record.num_experts
        self.register_buffer("expert", table.expert_VK)
        digest = bytearray.fromhex(table.record.dictionary_fingerprint)
        self.register_buffer("dictionary_fingerprint", torch.frombuffer(digest, dtype=torch.uint8).clone())

    def forward(self, token_T: Tensor) -> Assignment:
        """Look up the experts of token ids."""
        return Assignment(self.expert[token_T])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        fingerprint = state_dict.get(prefix + "dictionary_fingerprint")
        if fingerprint is not None and not torch.equal(fingerprint.cpu(), self.dictionary_fingerprint.cpu()):
            raise UserError(
                f"its hash table belongs to dictionary {_hex(fingerprint)}, this data has dictionary "
                f"{_hex(self.dictionary_fingerprint)}; prepare the data with the checkpoint's dict.txt "
                "(fairseq-preprocess --srcdict)"
            )
        expert_VK = state_dict.get(prefix + "expert")
        if expert_VK is not None:
            check_table(expert_VK, self.num_experts)
            if not is_evaluation() and not torch.equal(expert_VK.cpu(), self.expert.cpu()):
                raise UserError(
                    f"it has hash table {table_fingerprint(expert_VK)[:12]}, this model has "
                    f"{table_fingerprint(self.expert)[:12]}; write the checkpoint's by fairseq-hash checkpoint table, "
                    "and give that file as --hash-table"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _hex(fingerprint: Tensor) -> str:
    return bytes(fingerprint.tolist()).hex()[:12]


class HashTransformerDecoder(TransformerDecoder):
    """fairseq's `TransformerDecoder` with sparse layers as the options in `args` say."""

    def __init__(
        self,
        args: Namespace,
        dictionary: Dictionary,
        embed_tokens: nn.Module,
        no_encoder_attn: bool = False,
        output_projection: "nn.Module | None" = None,
        *,
        parallel: ExpertParallel,
    ) -> None:
        self.parallel = parallel
        self.options = SparseOptions.from_config(args)
        self.sparse_numbers = self.options.layer_numbers(args.decoder_layers)
        self._numbers = itertools.count()  # fairseq builds the layers in order and tells none its number
        super().__init__(args, dictionary, embed_tokens, no_encoder_attn, output_projection)
        cfg = TransformerConfig.from_namespace(args)
        places = list(self.sparse_numbers)
        if self.options.sparse_placement == "insert":
            places = [number + 1 + before for before, number in enumerate(places)]
            for place, number in zip(places, self.sparse_numbers, strict=True):
                self.layers.insert(place, _wrap(InsertedLayer(cfg, self.options, self.parallel, number), cfg))
        for place, number in zip(places, self.sparse_numbers, strict=True):
            hook = functools.partial(_keep_report, (number, self.options.router))
            self.layers[place].register_forward_hook(hook)
        self.hash_table: HashTableBuffers | None = None
        if self.options.router == "hash":
            self.hash_table = HashTableBuffers(_table(self.options, dictionary))

    def build_decoder_layer(self, cfg: TransformerConfig, no_encoder_attn: bool = False) -> nn.Module:
        """Build the next layer: fairseq's own, or a sparse one in its place."""
        number = next(self._numbers)
        if number in self.sparse_numbers and self.options.sparse_placement == "replace":
            return _wrap(SparseDecoderLayer(cfg, self.options, self.parallel, number), cfg)
        return super().build_decoder_layer(cfg, no_encoder_attn)

    def extract_features(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Any = None,
        incremental_state: "dict[str, dict[str, Tensor | None]] | None" = None,
        full_context_alignment: bool = False,
        alignment_layer: "int | None" = None,
        alignment_heads: "int | None" = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return features `[B, L, D]` and fairseq's extra outputs, with `routing`: the report of each sparse layer."""
        context = self.routing_context(prev_output_tokens if incremental_state is None else prev_output_tokens[:, -1:])
        x, extra = super().extract_features(
            prev_output_tokens,
            {"encoder_out": [context], "encoder_padding_mask": []},
            incremental_state,
            full_context_alignment,
            alignment_layer,
            alignment_heads,
        )
        extra["routing"] = context.reports
        return x, extra

    def routing_context(self, token_BL: Tensor) -> RoutingContext:
        """Return what the sparse layers share for token ids `[B, L]`: a hash route is made here, for all of them."""
        context = RoutingContext.of_tokens(token_BL, self.padding_idx)
        if self.hash_table is None:
            return context
        assignment = self.hash_table(context.token_T)
        options = self.options
        factor = options.capacity_factor if self.training else options.eval_capacity_factor
        plan = PlanUnderWay(assignment.expert_TK, self.parallel, factor)
        return RoutingContext(context.token_T, context.place_T, (assignment, plan))


def _table(options: SparseOptions, dictionary: Dictionary) -> HashTable:
    """Return the table that the options name; in evaluation one to be replaced, as the checkpoint has its own."""
    if is_evaluation():
        return placeholder_table(dictionary.symbols, options.num_experts)
    return build_table(options.hash_table, dictionary.symbols, dictionary.count, options.num_experts, options.hash_seed)


def _keep_report(layer: tuple[int, str], module: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    inputs[1].reports[layer] = output[2]


def _wrap(layer: nn.Module, cfg: TransformerConfig) -> nn.Module:
    """Wrap a sparse layer as fairseq's decoder wraps its own: activation checkpointing, sharded data parallel."""
    if cfg.checkpoint_activations:
        layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    return fsdp_wrap(layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap)
