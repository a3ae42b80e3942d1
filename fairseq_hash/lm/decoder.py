"""fairseq's Transformer decoder with sparse layers and memories: where they stand, and how token ids reach them.

The route of a forward pass is one `RoutingContext`. It goes to the layers through the argument `encoder_out`, which a
decoder-only model leaves empty and which activation checkpointing hands on to the recomputation. Each sparse layer
returns its report as the third output, which fairseq's decoder ignores; a forward hook on the layer puts it into the
context, after any checkpointing, so that the auxiliary losses have gradients.
"""

import dataclasses
import functools
import itertools
from argparse import Namespace
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerConfig, TransformerDecoder
from fairseq.modules import FairseqDropout
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import Tensor, nn

from fairseq_hash.lm.memories import InsertedMemory
from fairseq_hash.lm.predictor import Predictor
from fairseq_hash.lm.sparse_layers import Place, build_sparse_layer
from fairseq_hash.lm.table_buffers import HashTables, build_tables
from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.dispatch_plan import random_order
from fairseq_hash.moe.expert_layers import expert_layers
from fairseq_hash.moe.mapped_experts import MappedExperts
from fairseq_hash.moe.memory_rows import MemoryRows
from fairseq_hash.moe.read_ahead import ReadAhead
from fairseq_hash.moe.routers import statistics_of
from fairseq_hash.moe.routing_context import HashRoute, RoutingContext
from fairseq_hash.moe.routing_stats import report_size
from fairseq_hash.moe.token_dispatcher import TokenDispatcher
from fairseq_hash.options.sparse_options import SparseOptions


class SparseDecoderLayer(TransformerDecoderLayerBase):
    """A decoder layer whose FFN is a `SparseLayer`."""

    def __init__(
        self, cfg: TransformerConfig, options: SparseOptions, dispatcher: TokenDispatcher, place: Place
    ) -> None:
        super().__init__(cfg, no_encoder_attn=True)
        # The dense FFN is built first, and becomes expert 0: the random numbers of all other parameters are then those
        # of the dense model with the same seed.
        dense = self._modules.pop("fc1"), self._modules.pop("fc2")
        self.sparse = build_sparse_layer(options, cfg, dispatcher, place, first=dense)
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

    def __init__(
        self, cfg: TransformerConfig, options: SparseOptions, dispatcher: TokenDispatcher, place: Place
    ) -> None:
        super().__init__()
        self.sparse = build_sparse_layer(options, cfg, dispatcher, place)

    def forward(
        self, x: Tensor, encoder_out: RoutingContext, *args: Any, **kwargs: Any
    ) -> "tuple[Tensor, None, Tensor]":
        """Return x of shape `[L, B, D]`, None for attention weights, and the report; `encoder_out` is the context."""
        y, report = self.sparse(x, encoder_out)
        return x + y, None, report


class HashTransformerDecoder(TransformerDecoder):
    """fairseq's `TransformerDecoder` with sparse layers as the options in `args` say."""

    def __init__(
        self,
        args: Namespace,
        dictionary: Dictionary,
        *more: Any,
        dispatcher: TokenDispatcher,
        is_evaluation: bool = False,
        counts: "list[int] | None" = None,
        **named: Any,
    ) -> None:
        """Build the decoder of fairseq's arguments and of `dispatcher`, which brings tokens to the experts.

        `is_evaluation` says whether a checkpoint is loaded next, which has its own hash tables. `counts` say how often
        each symbol occurs in the training text; None: as the dictionary says.
        """
        self.dispatcher = dispatcher
        self.parallel = dispatcher.parallel
        self.options = SparseOptions.from_config(args)
        self.places = self._places(args.decoder_layers, len(dictionary))
        self._numbers = itertools.count()  # fairseq builds the layers in order and tells none its number
        super().__init__(args, dictionary, *more, **named)
        cfg = TransformerConfig.from_namespace(args)
        decoder_layers = list(self.layers)
        for before, place in enumerate(self.places.values()):
            at = place.number
            if self.options.sparse_placement == "insert":
                at += 1 + before
                self.layers.insert(at, _wrap(InsertedLayer(cfg, self.options, self.dispatcher, place), cfg))
            size = report_size(statistics_of(place.router), self.options.num_experts)
            self.layers[at].register_forward_hook(functools.partial(_keep_report, (place.number, place.router), size))
        self.memory_rows = nn.ModuleDict()
        for number in self.options.memory_numbers(args.decoder_layers):
            shape = self.options.memory_shape(len(dictionary))
            self.memory_rows[str(number)] = MemoryRows(shape, number, self.options.memory_seed, self.parallel)
            memory = InsertedMemory(shape, number, cfg.decoder.embed_dim, self.parallel)
            self.layers.insert(list(self.layers).index(decoder_layers[number]), _wrap(memory, cfg))
        self.hash_tables: HashTables | None = None
        self.predictor: Predictor | None = None
        hash_layers = sum(place.router == "hash" for place in self.places.values())
        if hash_layers:
            table_shape = self.options.table_shape(self.options.num_experts, self.max_positions())
            symbols, counts = dictionary.symbols, counts or dictionary.count
            self.hash_tables = build_tables(self.options, symbols, counts, table_shape, hash_layers, is_evaluation)

    def _places(self, decoder_layers: int, vocabulary: int) -> dict[int, Place]:
        """Return where the sparse layers stand, by the number of their decoder layer."""
        if not self.options.is_sparse:
            return {}
        routers = self.options.layer_routers(decoder_layers)
        hash_layers = [number for number, router in routers.items() if router == "hash"]
        routes = dict.fromkeys(hash_layers, 0)
        if self.options.has_table_per_layer:
            routes = {number: route for route, number in enumerate(hash_layers)}
        return {number: Place(number, router, routes.get(number), vocabulary) for number, router in routers.items()}

    def build_decoder_layer(self, cfg: TransformerConfig, no_encoder_attn: bool = False) -> nn.Module:
        """Build the next layer: fairseq's own, or a sparse one in its place."""
        place = self.places.get(next(self._numbers))
        if place is not None and self.options.sparse_placement == "replace":
            return _wrap(SparseDecoderLayer(cfg, self.options, self.dispatcher, place), cfg)
        return super().build_decoder_layer(cfg, no_encoder_attn)

    def extract_features(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Any = None,
        incremental_state: "dict[str, dict[str, Tensor | None]] | None" = None,
        *more: Any,
        **named: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return features `[B, L, D]` and fairseq's extra outputs, with `routing`: the report of each sparse layer.

        `update_sums` is what routers want to know after the update.
        """
        context = self.routing_context(prev_output_tokens, is_step=incremental_state is not None)
        if self.options.map_experts:
            mapped = [layer for layer in expert_layers(self).values() if isinstance(layer.experts, MappedExperts)]
            reader = ReadAhead([(layer.experts, layer.needed(layer.experts, context)) for layer in mapped])
            context = dataclasses.replace(context, read_ahead=reader)
        given = {"encoder_out": [context], "encoder_padding_mask": []}
        x, extra = super().extract_features(prev_output_tokens, given, incremental_state, *more, **named)
        extra["routing"], extra["update_sums"] = context.reports, context.update_sums
        extra["is_oracle"] = self.is_oracle
        return x, extra

    def set_predictor(self, predictor: Predictor) -> None:
        """Let the hash tables' rows be found by what a trained model predicts."""
        self.predictor = predictor
        self.hash_tables.require_predictor(predictor.fingerprint)

    @property
    def is_oracle(self) -> bool:
        """Whether a sparse layer sees the token that the model is to predict."""
        return bool(self.options.oracle)

    def routing_context(self, token_BL: Tensor, is_step: bool = False) -> RoutingContext:
        """Return what layers share for token ids `[B, L]`: the hash routes and the memories' look-ups are made here.

        `token_BL` is int64, the whole prefix. `is_step` says that the layers see the last token only, in generation
        step by step. Raises `SystemExit` with one line, in generation with an oracle.
        """
        if is_step and self.is_oracle:
            # Not an error that ranks wait for each other with: in generation some may have no sentence.
            raise SystemExit(
                f"fairseq_hash: {self.options.oracle} sees the next token, which generation does not have; evaluate "
                "such a model with fairseq-eval-lm only"
            )
        seen_BL = token_BL[:, -1:] if is_step else token_BL
        context = RoutingContext.of_tokens(seen_BL, self.padding_idx)
        for number, rows in self.memory_rows.items():
            row_BLJ = rows(token_BL, self.padding_idx)[:, -seen_BL.shape[1] :]
            context.memory_lookups[int(number)] = rows.begin(context.drop_padding(row_BLJ.transpose(0, 1)))
        if self.hash_tables is None:
            return context
        predicted_BL = None if self.predictor is None else self.predictor(token_BL)
        options, columns = self.options, self.options.multi_hash
        factor = options.capacity_factor if self.training else options.eval_capacity_factor
        drops_randomly = self.training and options.drop_priority == "random"
        share = options.hash_scale / options.experts_per_token
        for table in self.hash_tables:
            row_BL = table.rows(token_BL, self.padding_idx, predicted_BL)[:, -seen_BL.shape[1] :]
            expert_TK = table(context.select(row_BL))
            if columns > 1:  # of MultiHash: each expert has a group of rows for each segment
                expert_TK = expert_TK * columns + torch.arange(columns, device=expert_TK.device)
            weight_TK = None
            if share != 1:
                weight_TK = torch.full(expert_TK.shape, share, device=expert_TK.device)
            order_C = random_order(expert_TK) if drops_randomly and factor else None
            plan = self.dispatcher.in_segments(columns).begin(expert_TK, factor, order_C)
            context.hash_routes.append(HashRoute(Assignment(expert_TK, weight_TK), plan, columns))
        return context


def _keep_report(
    layer: tuple[int, str], size: int, _module: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]
) -> None:
    context: RoutingContext = inputs[1]
    context.reports[layer], update_sums_N = output[2].tensor_split([size])
    if len(update_sums_N):
        context.update_sums[layer] = update_sums_N.detach()


def _wrap(layer: nn.Module, cfg: TransformerConfig) -> nn.Module:
    """Wrap a layer as fairseq's decoder wraps its own: activation checkpointing, sharded data parallel."""
    if cfg.checkpoint_activations:
        layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    return fsdp_wrap(layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap)
