"""Whether a model's experts, tables and memories can be held here, counted from its options before all else."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from fairseq.models.transformer import TransformerConfig

from fairseq_hash.core.memory import check_fits
from fairseq_hash.hashing.features import OF_TOKENS
from fairseq_hash.hashing.registry import BUILDERS
from fairseq_hash.hashing.table import check_table_size
from fairseq_hash.lm.sparse_layers import build_experts
from fairseq_hash.options.sparse_options import SparseOptions
from fairseq_hash.parallel.groups import ExpertParallel

FLOAT = 4  # bytes: every model is made in fp32


def check_fits_here(
    args: "Mapping[str, Any] | Any", options: SparseOptions, vocabulary: int, parallel: ExpertParallel
) -> None:
    """Raise `UserError` where the experts of one rank, a table or the memories are more than this machine has memory.

    `vocabulary` is the number of symbols of the dictionary.
    """
    check_memories_fit(args, options, vocabulary, parallel.size)
    if not options.is_sparse:
        return
    routers = options.layer_routers(args.decoder_layers)
    if "hash" in options.routers and any(name.strip() in BUILDERS for name in options.hash_table.split(",")):
        shape = options.table_shape(options.num_experts, args.max_target_positions or args.tokens_per_sample)
        rows = vocabulary if options.hash_feature in OF_TOKENS else shape.num_keys
        check_table_size(rows, shape.columns, options.num_experts)
    values = len(routers) * parallel.local_experts * expert_size(args, options)
    learned = sum(router != "hash" for router in routers.values())
    values += learned * options.num_experts * args.decoder_embed_dim
    if torch.empty(0).device.type == "meta":  # a model without memory, to be counted
        return
    sublayers = f" --expert-sublayers {options.expert_sublayers}" if options.expert_sublayers > 1 else ""
    check_fits(
        FLOAT * values,
        f"the weights alone of one rank (--num-experts {options.num_experts}{sublayers}, {len(routers)} sparse layers)",
        "give fewer or smaller experts, or more ranks that share them",
    )


def check_memories_fit(args: "Mapping[str, Any] | Any", options: SparseOptions, vocabulary: int, ranks: int) -> None:
    """Raise `UserError` where one rank's rows of all memories are more than this machine has memory."""
    if not options.has_memory or torch.empty(0).device.type == "meta":
        return
    shape, numbers = options.memory_shape(vocabulary), options.memory_numbers(args.decoder_layers)
    check_fits(
        FLOAT * len(numbers) * sum(shape.rows_J) * shape.head_width / ranks,
        f"one rank's rows of {len(numbers)} memories (--memory-rows {options.memory_rows}, --memory-width "
        f"{options.memory_width})",
        "give fewer or narrower rows, or more ranks that share them",
    )


def expert_size(args: "Mapping[str, Any] | Any", options: SparseOptions) -> int:
    """Return the number of parameters of one expert."""
    with torch.device("meta"):
        one = build_experts(replace(options, expert_sublayers=1), TransformerConfig.from_namespace(args), [0], (0,))
    return sum(parameter.numel() for parameter in one.parameters()) * options.expert_sublayers
