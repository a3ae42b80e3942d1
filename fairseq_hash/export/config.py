"""Turns a checkpoint's options into `config.json`, and refuses models that cannot be exported."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fairseq_hash.checkpoint.hash_tables import NAME
from fairseq_hash.checkpoint.inspection import model_options
from fairseq_hash.checkpoint.manifest import require_all_experts
from fairseq_hash.core.errors import UserError
from fairseq_hash.export.tensors import Value
from fairseq_hash.options.sparse_options import SparseOptions

MODELING, TOKENIZATION = "modeling_fairseq_hash", "tokenization_fairseq_hash"
ACTIVATIONS = {"gelu_fast": "gelu_accurate"}  # older names
ACTIVATIONS.update({name: name for name in ("relu", "gelu", "gelu_accurate", "tanh", "linear")})
ROUTERS = ("none", "hash", "switch", "base")  # those that the exported code has
# Options that the exported model does not have, most of them of fairseq's decoder, and the values that switch them off.
REFUSED: dict[str, tuple[Any, ...]] = {
    "adaptive_softmax_cutoff": (None,),
    "adaptive_input": (False,),
    "character_embeddings": (False,),
    "base_layers": (0, None),
    "decoder_layers_to_keep": (None, ""),
    "quant_noise_pq": (0,),
    "scale_fc": (False, None),
    "scale_attn": (False, None),
    "scale_heads": (False, None),
    "scale_resids": (False, None),
    "base_evaluation": ("greedy",),
    "decoder_xformers_att_config": (None, ""),
    "memory_layers": ("",),
}
# Entries of a state besides the model's parameters and tables.
LEFT_OUT = re.compile(r"decoder\.(version|embed_positions\._float_tensor|hash_tables\.\d+\.dictionary_fingerprint)")


@dataclass(frozen=True)
class Model:
    """A checkpoint's model, ready to be written.

    Attributes:
        config: the content of `config.json`, except the tokens.
        tensors: weights and tables by name. Experts in shards are not read yet.
        options: the options of the sparse layers.
    """

    config: dict[str, Any]
    tensors: dict[str, Value]
    options: SparseOptions

    @property
    def is_oracle(self) -> bool:
        """Whether the model sees the token that it must predict."""
        return bool(self.options.oracle)


def model_of(path: object, state: Mapping[str, Any]) -> Model:
    """Return the model in a checkpoint's state, as `read_checkpoint` returns it.

    Raises:
        UserError: if it is not a language model, or one that cannot be exported.
    """
    require_all_experts(state, state["model"].manifest, path)
    given = model_options(state)
    tensors = {name: value for name, value in state["model"].items() if not LEFT_OUT.fullmatch(name)}
    if not given or "decoder_embed_dim" not in given or any(not name.startswith("decoder.") for name in tensors):
        raise UserError(
            f"{path} is not a language model of this package or of fairseq's transformer_lm; give a checkpoint of one"
        )
    options = SparseOptions.from_config(given)
    _check_exportable(path, given, options)
    rows = [len(tensors[f"decoder.{name}.weight"]) for name in ("embed_tokens", "output_projection")]
    if rows[0] != rows[1]:
        raise UserError(
            f"{path} predicts {rows[1]} of {rows[0]} symbols (--output-dictionary-size), which the exported model does "
            "not have; export a model without it"
        )
    if given.get("share_decoder_input_output_embed"):
        tensors.pop("decoder.output_projection.weight", None)  # the embedding of tokens
    config = {**_dense(given, tensors), **(_sparse(path, given, options, tensors) if options.is_sparse else {})}
    return Model(config, tensors, options)


def _check_exportable(path: object, given: Mapping[str, Any], options: SparseOptions) -> None:
    for name, off in REFUSED.items():
        value = given.get(name, off[0])
        if value not in off:
            raise UserError(
                f"{path} was trained with --{name.replace('_', '-')} {value}, which the exported model does not have; "
                "export a model without it"
            )
    if given.get("activation_fn", "relu") not in ACTIVATIONS:
        raise UserError(
            f"{path} was trained with --activation-fn {given['activation_fn']}; the exported model has "
            f" {', '.join(ACTIVATIONS)}"
        )
    for router in options.routers:
        if router not in ROUTERS:
            raise UserError(f"{path} has --router {router}; the exported model has {', '.join(ROUTERS)}")
    if options.is_sparse and options.hash_feature == "predicted":
        raise UserError(
            f"{path} was trained with --hash-feature predicted: its routes are what another model "
            f"({options.hash_predictor}) predicts, and one folder holds one model; export a model with another feature"
        )


def _dense(given: Mapping[str, Any], tensors: Mapping[str, Value]) -> dict[str, Any]:
    embedding = tensors["decoder.embed_tokens.weight"]
    positions = "learned" if given.get("decoder_learned_pos") else "sinusoidal"
    return {
        "architectures": ["FairseqHashForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODELING}.FairseqHashConfig",
            "AutoModelForCausalLM": f"{MODELING}.FairseqHashForCausalLM",
        },
        "model_type": "fairseq_hash",
        "torch_dtype": str(embedding.dtype).removeprefix("torch."),
        "vocab_size": len(embedding),
        "hidden_size": given["decoder_embed_dim"],
        "num_hidden_layers": given["decoder_layers"],
        "num_attention_heads": given["decoder_attention_heads"],
        "intermediate_size": given["decoder_ffn_embed_dim"],
        "input_size": embedding.shape[1],
        "output_size": given.get("decoder_output_dim") or given["decoder_embed_dim"],
        "max_position_embeddings": given.get("max_target_positions") or given.get("tokens_per_sample") or 1024,
        "positions": "none" if given.get("no_token_positional_embeddings") else positions,
        "activation_function": ACTIVATIONS[given.get("activation_fn", "relu")],
        "normalize_before": bool(given.get("decoder_normalize_before")),
        "final_norm": "decoder.layer_norm.weight" in tensors,
        "layernorm_embedding": bool(given.get("layernorm_embedding")),
        "scale_embedding": not given.get("no_scale_embedding"),
        "share_embeddings": bool(given.get("share_decoder_input_output_embed")),
    }


def _sparse(
    path: object, given: Mapping[str, Any], options: SparseOptions, tensors: Mapping[str, Value]
) -> dict[str, Any]:
    tables: dict[int, dict[str, list[int]]] = {}
    for name, value in tensors.items():
        if found := re.fullmatch(NAME, name):
            tables.setdefault(int(found[1]), {})[found[2]] = list(value.shape)
    places, hash_layers = [], 0
    for layer, router in options.layer_routers(given["decoder_layers"]).items():
        place: dict[str, Any] = {"layer": layer, "router": router}
        if router == "hash":
            place["table"] = hash_layers if options.has_table_per_layer else 0
            hash_layers += 1
            if place["table"] not in tables:
                raise UserError(f"{path} has no hash table for layer {layer}; use another checkpoint")
        places.append(place)
    names = ("sparse_placement", "num_experts", "expert_form", "expert_sublayers", "swiglu_limit", "shared_expert")
    names += ("eval_capacity_factor", "hash_feature", "hash_length", "multi_hash", "experts_per_token")
    names += ("hash_weights", "hash_score", "hash_scale", "gate", "expert_layer_norm")
    return {
        **{name: getattr(options, name) for name in names},
        "sparse_layers": places,
        "tables": [tables[number] for number in sorted(tables)],
    }
