"""When each of our options acts: one statement for each option, so that none is silently ignored.

A value that is not the default and cannot act beside the other options is refused. With `--router none`, a line in the
log names it instead, because configurations share options among dense and sparse models. Evaluation makes no such
check: its options are those of a checkpoint.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing.features import OF_BUCKETS
from fairseq_hash.hashing.registry import BUILDERS, DRAWN, OF_COUNTS
from fairseq_hash.moe.routers import router_class, router_names, statistics_of
from fairseq_hash.moe.routing_stats import loss_weights
from fairseq_hash.options.criterion_options import HashMoECriterionConfig, SparseCriterion
from fairseq_hash.options.sparse_options import SparseOptions


@dataclass(frozen=True)
class Statement:
    """When an option acts.

    Attributes:
        acts: whether the option acts beside these options of the model.
        needs: what the option needs to act, in the words of the command line.
        asks_nothing: a second value, besides the default, that has no effect and so needs nothing.
        is_shared: whether a model with `--router none` may have it: then the log names it, and it is not refused.
    """

    acts: Callable[[SparseOptions], bool]
    needs: str = ""
    asks_nothing: Any = None
    is_shared: bool = True


def _statistics(options: SparseOptions) -> list[type]:
    return [statistics_of(router) for router in options.routers if router in router_names()]


def _has_loss(options: SparseOptions, weight: str, without: str = "") -> bool:
    """Whether a router has a loss that this option of the criterion weighs; one may be left out."""
    routers = [router for router in options.routers if router in router_names() and router != without]
    return any(weight in loss_weights(statistics_of(router)).values() for router in routers)


def _has_balance_loss(options: SparseOptions) -> bool:
    return _has_loss(options, "load_balance_weight", without="" if options.balancing == "loss" else "topk")


def _tables(options: SparseOptions) -> list[str]:
    return [name.strip() for name in options.hash_table.split(",")]


def _has_hash(options: SparseOptions) -> bool:
    return "hash" in options.routers


def _weighs_several(options: SparseOptions) -> bool:
    return _has_hash(options) and options.experts_per_token > 1


def _has_topk(options: SparseOptions, balancing: str = "") -> bool:
    """Whether a router is topk; with this balancing, if one is given."""
    return "topk" in options.routers and balancing in ("", options.balancing)


def _draws_tables(options: SparseOptions) -> bool:
    """Whether some table depends on the seed. Of balanced tables all but the first one do."""
    has_further = options.hash_per_layer or options.multi_hash > 1
    return any(name in DRAWN or (name == "balanced" and has_further) for name in _tables(options))


def _fills_buckets(options: SparseOptions) -> bool:
    return options.hash_feature in OF_BUCKETS and any(name in BUILDERS for name in _tables(options))


OF_OWN_ORDER = {"gshard", "expert-choice"}  # they say themselves in which order an expert takes tokens
ALWAYS = Statement(lambda options: True)
SPARSE = Statement(lambda options: options.is_sparse, "experts (a --router other than none)")
HASH = Statement(_has_hash, "a hash layer (--router hash)")
SWITCH = Statement(lambda options: "switch" in options.routers, "a switch layer (--router switch)")
STABLE = Statement(lambda options: "stablemoe" in options.routers, "a StableMoE layer (--router stablemoe)")
BALANCED = Statement(
    _has_balance_loss,
    "a layer with a load-balancing loss (--router switch, gshard or stablemoe, or topk with --balancing loss)",
)
Z_LOSS = Statement(
    lambda options: _has_loss(options, "z_loss_weight"), "a switch or topk layer (--router switch or topk)"
)
TOPK = Statement(_has_topk, "a topk layer (--router topk)")
SEQUENCE = Statement(lambda options: _has_topk(options) and options.sequence_loss, "--router topk --sequence-loss")
GSHARD = Statement(lambda options: "gshard" in options.routers, "a GShard layer (--router gshard)")
SINKHORN = Statement(lambda options: "sinkhorn" in options.routers, "a Sinkhorn layer (--router sinkhorn)")
BASE = Statement(lambda options: "base" in options.routers, "a BASE layer (--router base)")
GATED = Statement(
    lambda options: not {"switch", "base"}.isdisjoint(options.routers), "a gate (--router switch or base)"
)
MEMORY = Statement(lambda options: options.has_memory, "a memory (--memory-layers)")
HASHED_MEMORY = Statement(
    lambda options: options.has_memory and options.memory_orders.strip() != "1",
    "a memory of n-grams (--memory-layers, --memory-orders of 2 or more)",
)
SEVERAL = Statement(_weighs_several, "several experts per token (--router hash, --experts-per-token 2 or more)")

MODEL = {
    "router": ALWAYS,
    "num_experts": SPARSE,
    "sparse_layers": SPARSE,
    "sparse_placement": SPARSE,
    "expert_sublayers": Statement(
        lambda options: options.is_sparse and options.sparse_placement == "insert", "--sparse-placement insert"
    ),
    "capacity_factor": SPARSE,
    "eval_capacity_factor": SPARSE,
    "router_jitter": SWITCH,
    "base_balance": BASE,
    "stable_updates": STABLE,
    "stable_width": STABLE,
    "second_expert_policy": GSHARD,
    "sinkhorn_balance": SINKHORN,
    "sinkhorn_iterations": SINKHORN,
    "sinkhorn_tolerance": SINKHORN,
    "expert_dropout": SPARSE,
    "recompute_hidden": SPARSE,
    "expert_form": SPARSE,
    "swiglu_limit": Statement(
        lambda options: options.is_sparse and options.expert_form == "swiglu", "--expert-form swiglu"
    ),
    "shared_expert": SPARSE,
    "expert_parallel_size": SPARSE,
    "expert_dispatch": SPARSE,
    "expert_placement": SPARSE,  # refused where each rank holds one expert or all
    "expert_replicas": SPARSE,  # refused without loads, and where each rank holds all
    "from_dense": Statement(SPARSE.acts, SPARSE.needs, is_shared=False),
    "freeze": Statement(SPARSE.acts, SPARSE.needs, is_shared=False),
    "map_experts": ALWAYS,  # refused in training, in which it never acts
    "hash_table": HASH,
    "hash_seed": Statement(
        lambda options: _has_hash(options) and _draws_tables(options),
        f"a table that is drawn (--router hash, --hash-table {' or '.join(DRAWN)}; balanced with --hash-per-layer or "
        "--multi-hash)",
    ),
    "hash_count_eos": Statement(
        lambda options: _has_hash(options) and not set(OF_COUNTS).isdisjoint(_tables(options)),
        "a table that is built here by counts (--router hash, --hash-table balanced or scattered)",
    ),
    "hash_per_layer": Statement(
        lambda options: options.hash_layers > 1, "two hash layers or more (--router hash, --sparse-layers 1,3)"
    ),
    "hash_feature": HASH,
    "hash_length": HASH,
    "hash_buckets": Statement(
        lambda options: _has_hash(options) and _fills_buckets(options),
        f"a table of buckets that is built here (--router hash, --hash-feature {', '.join(OF_BUCKETS)})",
    ),
    "hash_predictor": HASH,
    "multi_hash": HASH,
    "experts_per_token": Statement(
        lambda options: _has_hash(options) or _has_topk(options), "a hash or topk layer (--router hash or topk)"
    ),
    "hash_weights": SEVERAL,
    "hash_score": Statement(
        lambda options: _weighs_several(options) and options.hash_weights == "learned", "--hash-weights learned"
    ),
    "hash_scale": HASH,
    "gate": GATED,
    "base_evaluation": BASE,
    "drop_priority": Statement(
        lambda options: options.is_sparse and options.capacity_factor > 0 and not {*options.routers} <= OF_OWN_ORDER,
        "--capacity-factor above 0, and a router that leaves the order to it (not gshard, not expert-choice)",
    ),
    "expert_layer_norm": SPARSE,
    "balancing": TOPK,
    "router_score": TOPK,
    "normalize_weights": Statement(
        lambda options: _has_topk(options) and options.experts_per_token > 1,
        "several experts per token (--router topk, --experts-per-token 2 or more)",
    ),
    "router_scale": TOPK,
    "bias_step": Statement(lambda options: _has_topk(options, "bias"), "--router topk --balancing bias"),
    "quantile_smoothing": Statement(
        lambda options: _has_topk(options, "quantile"), "--router topk --balancing quantile"
    ),
    "sequence_loss": TOPK,
    "memory_layers": ALWAYS,
    "memory_orders": MEMORY,
    "memory_heads": MEMORY,
    "memory_rows": HASHED_MEMORY,
    "memory_width": MEMORY,
    "memory_seed": HASHED_MEMORY,
}
CRITERION = {
    "load_balance_weight": Statement(BALANCED.acts, BALANCED.needs, asks_nothing=0),
    "z_loss_weight": Z_LOSS,
    "distill_weight": STABLE,
    "sequence_loss_weight": SEQUENCE,
    "log_expert_loads": SPARSE,
    # Without an interval the criterion refuses the other two.
    **dict.fromkeys(("monitor_interval", "monitor_patience", "monitor_overload"), SPARSE),
    "update_freq_ranks": ALWAYS,
}


def check_model(options: SparseOptions) -> list[str]:
    """Raise `UserError` for an option that cannot act. Return those that a model with `--router none` does not use."""
    return _check(options, {f.name: f.default for f in fields(SparseOptions)}, MODEL, vars(options))


def check_criterion(kind: type, config: Mapping[str, Any], options: SparseOptions) -> list[str]:
    """Do the same for a criterion: its class, and its options with its name as `_name`.

    Raises:
        UserError: if an option cannot act, or a router needs another criterion.
    """
    for statistics in _statistics(options):
        for loss, weight in loss_weights(statistics).items():
            if isinstance(weight, str) and weight not in CRITERION:
                raise UserError(
                    f"the loss {loss} of {statistics.__name__} has the weight {weight!r}, which is no option of the "
                    f"criterion hash_moe; give {', '.join(n for n in CRITERION if n.endswith('_weight'))} or a number"
                )
    name = config["_name"]
    if not issubclass(kind, SparseCriterion):
        if any(map(loss_weights, _statistics(options))):
            raise UserError(
                f"--criterion {name} leaves out the load-balancing loss of --router {options.router}; use --criterion "
                "hash_moe (without that loss: --load-balance-weight 0)"
            )
        if any(hasattr(router_class(router), "after_update") for router in options.routers if router in router_names()):
            raise UserError(
                f"--criterion {name} does not count tokens per expert, which --router {options.router} needs after "
                "each update; use --criterion hash_moe"
            )
        if options.oracle:
            raise UserError(
                f"--criterion {name} calls the perplexity of {options.oracle}, an oracle, a language model's; use "
                "--criterion hash_moe"
            )
        return []
    return _check(options, {f.name: f.default for f in fields(HashMoECriterionConfig)}, CRITERION, config)


def in_vain(texts: list[str]) -> str:
    """Return one line about options of a dense model that do nothing."""
    return f"a dense model has no use for {', '.join(texts)}"


def _check(
    options: SparseOptions, defaults: Mapping[str, Any], statements: Mapping[str, Statement], values: Mapping[str, Any]
) -> list[str]:
    shared = []
    for name, statement in statements.items():
        value = values.get(name, defaults[name])
        if value in (defaults[name], statement.asks_nothing) or statement.acts(options):
            continue
        text = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        if options.is_dense_by_name and statement.is_shared:
            shared.append(text)
            continue
        if not options.router:
            raise UserError(
                f"{text} needs {statement.needs}, and no --router is given; give one, or --router none for a dense "
                "model"
            )
        raise UserError(
            f"{text} needs {statement.needs}, and does nothing here, with --router {options.router}; leave it out, or "
            "give what it needs"
        )
    return shared
