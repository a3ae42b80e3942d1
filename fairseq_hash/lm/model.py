"""The model `hash_transformer_lm`: options, sized architectures, and what is recorded of it in the log."""

import functools
import json
import logging
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fairscale.nn.wrap.auto_wrap import ConfigAutoWrap
from fairseq import utils
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig, base_lm_architecture
from fairseq.tasks import FairseqTask
from torch import nn

from fairseq_hash.checkpoint.loading import SavedState, one_line
from fairseq_hash.checkpoint.manifest import Manifest
from fairseq_hash.checkpoint.model_state import ModelState
from fairseq_hash.core.errors import UserError
from fairseq_hash.core.validators import refuse
from fairseq_hash.fairseq_patches.model_building import (
    ForEvaluation,
    allow_bf16_without_tpu,
    language_model_decoder,
    set_architecture,
)
from fairseq_hash.hashing import dictionary_fingerprint
from fairseq_hash.lm.decoder import HashTransformerDecoder
from fairseq_hash.lm.freezing import freeze
from fairseq_hash.lm.line_ends import counts_with_line_ends
from fairseq_hash.lm.memory_check import check_fits_here
from fairseq_hash.lm.placement import placed
from fairseq_hash.lm.predictor import load_predictor
from fairseq_hash.moe.dispatchers import check_dispatcher, make_dispatcher
from fairseq_hash.moe.expert_layers import expert_layers
from fairseq_hash.moe.parameter_counts import count_parameters, count_trained
from fairseq_hash.moe.routers.topk import BY_BIAS
from fairseq_hash.options import option_use
from fairseq_hash.options.sparse_options import SparseOptions
from fairseq_hash.parallel.collectives import check_same, one_line_errors, run_on_all_ranks
from fairseq_hash.parallel.gradients import reduce_expert_gradients
from fairseq_hash.parallel.groups import ExpertParallel, expert_names, expert_parallel
from fairseq_hash.parallel.watchdog import watchdog_of
from fairseq_hash.provenance import corpus_of, provenance
from fairseq_hash.training.shared_experts import check_device

logger = logging.getLogger("fairseq_hash.model")  # the name that reports of all versions look for

# What would make ranks train different models, or wait for each other for ever.
SAME_ON_ALL_RANKS = ("fairseq_hash", "torch", "dictionary_fingerprint", "table_fingerprint", "predictor_fingerprint")
SAME_ON_ALL_RANKS += ("parameters_total",)

# What a checkpoint's manifest says of a model.
FACTS = ("num_experts", "router", "dictionary_fingerprint", "table_fingerprint")


@dataclass
class HashTransformerLMConfig(SparseOptions, TransformerLanguageModelConfig):
    """The options of fairseq's `transformer_lm` and those of the sparse layers."""


@register_model("hash_transformer_lm", dataclass=HashTransformerLMConfig)
class HashTransformerLanguageModel(TransformerLanguageModel):
    """A Transformer language model whose chosen layers have experts; without any, it is fairseq's `transformer_lm`."""

    @classmethod
    def hub_models(cls) -> dict[str, Any]:
        """Return no models: fairseq's own are of another class."""
        return {}

    @classmethod
    @one_line_errors
    def build_model(cls, args: "Mapping[str, Any] | Namespace", task: FairseqTask) -> "HashTransformerLanguageModel":
        """Build the model and log its record, one line of JSON.

        Raises:
            SystemExit: with one line, where an option is out of range or does not fit another.
        """
        is_evaluation = isinstance(task, ForEvaluation)
        options = SparseOptions.from_config(args)
        run_on_all_ranks(functools.partial(check_options, args, options, is_evaluation))
        check_same(asdict(options))
        if not (options.is_sparse or options.has_memory):
            model = run_on_all_ranks(functools.partial(super().build_model, args, task))
        else:
            if is_evaluation or not options.is_sparse:  # a memory without experts has all rows on every rank
                parallel = ExpertParallel(options.num_experts if options.is_sparse else 1)
            else:
                parallel = expert_parallel(options.num_experts, options.expert_parallel_size)
                check_dispatcher(parallel, options.expert_dispatch)
                positions = args.max_target_positions or args.tokens_per_sample
                place = functools.partial(placed, parallel, options, args.decoder_layers, task, positions)
                parallel = run_on_all_ranks(place)
                check_same({"placement of experts": parallel.order})
            if not is_evaluation:
                vocabulary = len(task.source_dictionary)
                run_on_all_ranks(functools.partial(check_fits_here, args, options, vocabulary, parallel))
            if parallel.is_shared:  # from here on a rank that fails ends the job: the others wait for it
                watchdog_of(parallel.rank, parallel.world_size)
            dispatcher = make_dispatcher(parallel, options.expert_dispatch)
            counts = None
            if options.hash_count_eos and not is_evaluation:
                counts = run_on_all_ranks(functools.partial(counts_with_line_ends, task))
            decoder = functools.partial(
                HashTransformerDecoder, dispatcher=dispatcher, is_evaluation=is_evaluation, counts=counts
            )
            with language_model_decoder(decoder):
                model = run_on_all_ranks(functools.partial(super().build_model, args, task))
            if options.hash_predictor:
                load = functools.partial(load_predictor, options.hash_predictor, task)
                model.decoder.set_predictor(run_on_all_ranks(load))
            if model.decoder.is_oracle:
                logger.warning("%s sees the next token: its perplexity is an oracle's", options.oracle)
            if not is_evaluation:
                freeze(model, options.freeze)
            model._ddp_params_and_buffers_to_ignore = expert_names(model)  # torch's DistributedDataParallel reads it
            if options.is_sparse:
                logger.info("expert_parallel | %s", parallel.describe())
        record = model_record(model, args, options, task)
        if is_evaluation:  # it takes its table from the checkpoint, later
            record["table_fingerprint"] = None
        check_same({key: record[key] for key in SAME_ON_ALL_RANKS})
        model.hash_state = ModelState(
            options,
            is_oracle=options.is_sparse and model.decoder.is_oracle,
            from_dense=options.from_dense,
            freeze=options.freeze,
            facts={key: record[key] for key in FACTS},
        )
        logger.info("model_record | %s", json.dumps(record))
        return model

    def all_reduce_grads(self) -> None:
        """Reduce the experts' gradients among their replicas; fairseq's optimizers call it once an update."""
        for layer in expert_layers(self).values():
            if layer.parallel.is_shared:
                reduce_expert_gradients(layer.experts.parameters(), layer.parallel)

    def upgrade_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Upgrade a saved state as fairseq does, but for the output projection that an adaptive softmax does not have.

        fairseq's decoder adds one wherever embeddings are shared, and cannot load the state then.
        """
        super().upgrade_state_dict(state_dict)
        if getattr(self.decoder, "adaptive_softmax", None) is not None:
            state_dict.pop("decoder.output_projection.weight", None)

    @one_line_errors
    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint's weights, each rank its own experts.

        Raises:
            SystemExit: on every rank, with one line, where a rank finds that they are damaged, or do not fit: another
                number of experts, dictionary or table, other sizes.
        """
        return run_on_all_ranks(functools.partial(self._load, state_dict, *args, **kwargs))

    def _load(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        path, manifest = (state_dict.path, state_dict.manifest) if isinstance(state_dict, SavedState) else (None, None)
        try:
            if manifest is not None:
                check_manifest(manifest, self.hash_state.facts)
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            raise UserError(f"{path or 'the state'} does not fit this model: {one_line(error)}") from error
        except UserError as error:
            raise UserError(f"{path}: {error}" if path else str(error)) from error


def check_manifest(manifest: Manifest, facts: Mapping[str, Any]) -> None:
    """Raise `UserError` where a checkpoint's experts, dictionary or table are not those of a model."""
    if manifest.router != "none" and facts["router"] == "none":
        raise UserError(f"it has {manifest.num_experts} experts and --router {manifest.router}; this model is dense")
    if manifest.router == "none" and facts["router"] != "none":
        raise UserError("it is a dense model, this one has experts; a new training starts from it by --from-dense")
    manifest.check(facts["num_experts"], facts["dictionary_fingerprint"], facts["table_fingerprint"])


def check_options(args: Any, options: SparseOptions, is_evaluation: bool) -> None:
    """Raise `UserError` where an option is out of range, or one of fairseq's does not go with sparse layers."""
    options.check()
    check_device(is_sharded=ConfigAutoWrap.in_autowrap_context, on_cpu=False)
    if options.map_experts and not is_evaluation:
        raise UserError("--map-experts is for evaluation: fairseq-eval-lm --model-overrides \"{'map_experts': True}\"")
    if not is_evaluation and (texts := option_use.check_model(options)):
        logger.warning(option_use.in_vain(texts))
    if options.has_memory:
        options.memory_numbers(args.decoder_layers)
        refuse(
            {
                f"--decoder-layerdrop {args.decoder_layerdrop} skips memories; leave it out": (
                    args.decoder_layerdrop > 0
                ),
                f"--decoder-layers-to-keep {args.decoder_layers_to_keep} renumbers the layers that --memory-layers "
                "names; leave it out": args.decoder_layers_to_keep,
            }
        )
    if not options.is_sparse:
        return
    if options.freeze != "none" and ConfigAutoWrap.in_autowrap_context:
        raise UserError(
            f"--freeze {options.freeze} does not go with --ddp-backend fully_sharded, which makes one tensor "
            "of weights that train and others; use legacy_ddp or pytorch_ddp"
        )
    if "topk" in options.routers and options.balancing in BY_BIAS and ConfigAutoWrap.in_autowrap_context:
        raise UserError(
            f"--balancing {options.balancing} does not go with --ddp-backend fully_sharded, which rounds the biases in "
            "half precision; use legacy_ddp or pytorch_ddp"
        )
    options.layer_routers(args.decoder_layers)
    if options.from_dense and options.expert_form != "plain":
        raise UserError(f"--from-dense copies a plain FFN; --expert-form {options.expert_form} has no such weights")
    replaces = options.sparse_placement == "replace"
    refusals = {
        f"--base-layers {args.base_layers} is fairseq's own BASE layer, which PyPI's fairseq cannot build; use "
        "--router base --sparse-placement insert": args.base_layers,
        f"--decoder-layerdrop {args.decoder_layerdrop} skips layers whose routing is reported; leave it out or use "
        "--router none": args.decoder_layerdrop > 0,
        f"--decoder-layers-to-keep {args.decoder_layers_to_keep} renumbers the layers that --sparse-layers names; "
        "leave it out": args.decoder_layers_to_keep,
        f"--quant-noise-pq {args.quant_noise_pq} does not apply to experts; leave it out or use --router none": (
            args.quant_noise_pq > 0
        ),
        "--scale-fc does not apply to experts; leave it out or use --sparse-placement insert": (
            args.scale_fc and replaces
        ),
    }
    refuse(refusals)


def model_record(model: nn.Module, args: Any, options: SparseOptions, task: FairseqTask) -> dict[str, Any]:
    """Return what a report needs to know of a model: options, sizes, fingerprints and provenance, ready for JSON."""
    total, active = count_parameters(model)
    sparse = options.is_sparse
    tables, predictor = (model.decoder.hash_tables, model.decoder.predictor) if sparse else (None, None)
    return {
        **provenance(),
        **{key: value for key, value in asdict(options).items() if key != "_name"},
        "router": options.router or "none",
        "oracle": options.oracle,
        "num_experts": options.num_experts if sparse else 1,
        "expert_parallel_size": model.decoder.parallel.size if sparse else 1,
        "sparse_layers": list(options.layer_numbers(args.decoder_layers)) if sparse else [],
        "parameters_total": total,
        "parameters_active": active,
        "parameters_trained": count_trained(model),
        "corpus": corpus_of(Path(utils.split_paths(task.args.data)[0])),
        "dictionary_fingerprint": dictionary_fingerprint(task.source_dictionary.symbols),
        "table_fingerprint": tables.fingerprint if tables is not None else None,
        "predictor_fingerprint": predictor.fingerprint if predictor is not None else None,
    }


# Layers, D, F and attention heads by the end of an architecture's name.
SIZES = {
    "tiny": (4, 128, 512, 4),  # minutes on a CPU
    "small": (6, 512, 2048, 8),
    "base": (12, 768, 3072, 12),  # GPT-2's smallest, and StableMoE's base set-up
    "medium": (24, 1024, 4096, 16),
    "large": (24, 2048, 8192, 16),  # the dense part of BASE's 4.5B model
}


def architecture(size: str, args: Namespace) -> None:
    """Fill in what the command line leaves open: sizes first, then the defaults of the sparse layers and of fairseq."""
    names = ("decoder_layers", "decoder_embed_dim", "decoder_ffn_embed_dim", "decoder_attention_heads")
    defaults = dict(zip(names, SIZES[size], strict=True))
    if size == "tiny":
        defaults |= {"dropout": 0.0, "share_decoder_input_output_embed": True}
    defaults |= {f.name: f.default for f in fields(SparseOptions) if f.name != "_name"}
    for name, value in defaults.items():
        if not hasattr(args, name):
            setattr(args, name, value)
    base_lm_architecture(args)
    allow_bf16_without_tpu(args)


set_architecture("hash_transformer_lm", allow_bf16_without_tpu)


for _size in SIZES:
    register_model_architecture("hash_transformer_lm", f"hash_transformer_lm_{_size}")(
        functools.partial(architecture, _size)
    )
