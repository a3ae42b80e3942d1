"""Options of the sparse layers: one dataclass; each field has a help text with unit and range, and a check."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Optional

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.options import option
from fairseq_hash.core.validators import check_at_least, check_one_of, check_probability, layers_of, refuse
from fairseq_hash.moe.dispatchers import DEFAULT, DISPATCHERS
from fairseq_hash.moe.distributed_assignment import BALANCES
from fairseq_hash.moe.routers import router_names, sees_future
from fairseq_hash.options.batch_options import BatchRouterOptions
from fairseq_hash.options.gate_options import GateOptions
from fairseq_hash.options.hash_options import HashOptions
from fairseq_hash.options.memory_options import MemoryOptions
from fairseq_hash.options.stable_options import StableOptions
from fairseq_hash.options.topk_options import TopKOptions
from fairseq_hash.parallel.placement import BALANCED, CONTIGUOUS

PLACEMENTS = ("replace", "insert")
FORMS = ("plain", "swiglu")
FREEZES = ("none", "experts", "all-but-experts")


@dataclass
class SparseOptions(GateOptions, HashOptions, MemoryOptions, TopKOptions, BatchRouterOptions, StableOptions):
    """Options of the sparse layers of a `hash_transformer_lm`. `check` raises `UserError` for a value out of range."""

    router: str = option(
        "",
        "router, which picks the expert of each token: none (a dense model, fairseq's transformer_lm), hash (a fixed "
        "table over a feature of the tokens), switch (learned top-1), topk (learned, --experts-per-token of them), "
        "gshard (learned top-2), base (learned, balanced assignment), sinkhorn (the same, balanced softly), "
        "expert-choice (experts choose tokens: an oracle), stablemoe (learned, then fixed by token id), random-linear "
        "(a frozen random projection, for ablations); one for all sparse layers, or one for each, comma separated, "
        "such as hash,hash,switch; default: none, with which no other option of experts may be given",
    )
    num_experts: int = option(16, "number of experts of each sparse layer, 1 or more")
    sparse_layers: str = option(
        "", "decoder layers with experts, from 0, comma separated, such as 1,3; required unless --router none"
    )
    sparse_placement: str = option(
        "replace",
        "replace: the experts replace the layer's FFN (Hash Layers, Switch); insert: an extra stack of residual "
        "sub-layers follows the layer (BASE)",
    )
    expert_sublayers: int = option(
        1, "residual sub-layers of each expert, 1 or more; more than 1 needs --sparse-placement insert"
    )
    capacity_factor: float = option(
        0.0,
        "capacity of an expert: the largest number of tokens it takes in a training batch, as a multiple of the mean "
        "load (1.25 in Switch, 1 in GShard); 0 drops nothing; with --router expert-choice, the mean number of experts "
        "of a token",
    )
    eval_capacity_factor: float = option(0.0, "the same in validation, evaluation and generation; 0 drops nothing")
    router_jitter: float = option(
        0.0,
        "in training, multiply the input of the switch router by uniform noise in [1 - JITTER, 1 + JITTER]; 0 to less "
        "than 1 (0.01 in Switch)",
    )
    base_balance: str = option(
        "global",
        "in training, --router base balances its assignment over the batch of all ranks that share experts (global), "
        "over a random share of it on each rank (shuffle: as published), or over each rank's own tokens (local)",
    )
    expert_dropout: Optional[float] = option(
        None,
        "dropout probability of the experts' hidden layer, 0 to less than 1; default: --activation-dropout "
        "(--relu-dropout), as in a dense FFN",
    )
    recompute_hidden: bool = option(
        False,
        "recompute the experts' hidden layer in the backward pass instead of keeping it: saves tokens x hidden width "
        "values of memory per sparse layer, and costs a seventh matrix product beside the usual six",
    )
    expert_form: str = option(
        "plain",
        "plain: linear, activation, linear, as fairseq's FFN; swiglu: gated and without biases, as in frontier models "
        "(50 % more parameters at the same hidden width)",
    )
    swiglu_limit: float = option(
        0.0,
        "clamp of --expert-form swiglu: the largest gate, and the largest magnitude of the value it multiplies; 0: no "
        "limit",
    )
    shared_expert: bool = option(False, "add to each sparse layer one more expert that serves every token")
    expert_parallel_size: int = option(
        0,
        "ranks that share one set of experts, a divisor of the number of ranks and of --num-experts; 0: the largest "
        "possible; 1: all experts on every rank",
    )
    expert_dispatch: str = option(
        "all-to-all",
        "token dispatcher between ranks that share experts: all-to-all (sends exactly the rows that must move) or "
        "fairscale (its MOELayer: full capacity buffers, fp32 only); the result is the same",
    )
    expert_placement: str = option(
        CONTIGUOUS,
        "which experts share a rank: contiguous (the next E / P), balanced (ranks as even as the hash tables' loads "
        "allow, by the counts in the dictionary and the lines of the binarized train), or a file of loads, as "
        "fairseq-hash plan --loads writes it; the result is the same, and checkpoints do not depend on it",
    )
    expert_replicas: int = option(
        0,
        "replicas: further copies of the heaviest experts in each group of ranks, which divide their rows, 0 or more, "
        "a multiple of --expert-parallel-size; needs --expert-placement balanced or a file of loads; the result is the "
        "same to rounding, and checkpoints do not depend on it",
    )
    from_dense: str = option(
        "",
        "upcycling: start a new training from the checkpoint of a dense model of the same sizes (--router none, or "
        "fairseq's transformer_lm); every expert starts as the FFN of its layer",
    )
    freeze: str = option(
        "none",
        "weights that do not train, in fine-tuning with --finetune-from-model, say: none, experts (those of the "
        "sparse layers, the shared one included) or all-but-experts (everything else, routers included); evaluation "
        "ignores it",
    )
    map_experts: bool = option(
        False,
        "evaluation only, as --model-overrides \"{'map_experts': True}\": leave the experts in the checkpoint's "
        "files, memory-mapped, and read those that come next while others compute",
    )

    @classmethod
    def from_config(cls, config: "Mapping[str, Any] | Namespace") -> "SparseOptions":
        """Take the options out of a model's configuration. An option that an older checkpoint lacks has its default."""
        values = vars(config) if isinstance(config, Namespace) else config
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name != "_name" and f.name in values})

    @property
    def is_sparse(self) -> bool:
        """Whether the model has sparse layers."""
        return self.routers != ("none",)

    @property
    def is_dense_by_name(self) -> bool:
        """Whether `--router none` is given, so that a dense model is intended and no router was forgotten."""
        return bool(self.router) and not self.is_sparse

    @property
    def oracle(self) -> str:
        """The option by which the model sees the token that it is to predict; empty if it does not."""
        if "hash" in self.routers and self.feature.is_oracle:
            return f"--hash-feature {self.hash_feature}"
        if "base" in self.routers and self.base_evaluation == "balanced":
            return "--base-evaluation balanced"
        return next((f"--router {router}" for router in self.routers if sees_future(router)), "")

    @property
    def hash_layers(self) -> int:
        """How many of the layers that `sparse_layers` names have a hash router."""
        layers = len([number for number in self.sparse_layers.split(",") if number.strip()])
        return layers if self.routers == ("hash",) else self.routers.count("hash")

    def layer_routers(self, decoder_layers: int) -> dict[int, str]:
        """Return the router of each sparse decoder layer, in ascending order, for a decoder of `decoder_layers` layers.

        Raises `UserError` if a layer number is missing, not a number, repeated or out of range, or if there is neither
        one router nor one for each layer.
        """
        numbers = self.layer_numbers(decoder_layers)
        routers = self.routers
        if len(routers) == 1:
            routers *= len(numbers)
        if len(routers) != len(numbers):
            raise UserError(
                f"--router {self.router} names {len(routers)} routers, --sparse-layers {self.sparse_layers} "
                f"{len(numbers)} layers; give one router for all layers, or one for each"
            )
        return dict(zip(numbers, routers, strict=True))

    @property
    def routers(self) -> tuple[str, ...]:
        """The routers that `router` names; `none` if it names nothing."""
        return tuple(name.strip() for name in (self.router or "none").split(","))

    def layer_numbers(self, decoder_layers: int) -> tuple[int, ...]:
        """Return the sparse decoder layers in ascending order, for a decoder of `decoder_layers` layers."""
        if not str(self.sparse_layers).strip(", "):
            raise UserError(
                f"--router {self.router} needs --sparse-layers, such as --sparse-layers 1,3 (layers from 0)"
            )
        return layers_of("--sparse-layers", self.sparse_layers, decoder_layers)

    def check(self) -> None:
        """Raise `UserError` for the first value that is out of its range."""
        for router in self.routers:
            check_one_of("--router", router, ("none", "hash", *router_names()))
        if "none" in self.routers and len(self.routers) > 1:
            raise UserError(
                f"--router {self.router}: none cannot be mixed with other routers; leave the dense layer "
                "out of --sparse-layers"
            )
        check_one_of("--sparse-placement", self.sparse_placement, PLACEMENTS)
        check_one_of("--expert-dispatch", self.expert_dispatch, tuple(DISPATCHERS))
        if self.expert_placement == BALANCED and self.is_sparse and "hash" not in self.routers:
            raise UserError(
                f"--expert-placement {BALANCED} needs the tables of hash layers, and --router {self.router} has none; "
                "give a file of loads (fairseq-hash plan --loads --from-run RUN --out FILE)"
            )
        self.check_replicas()
        check_one_of("--base-balance", self.base_balance, BALANCES)
        check_one_of("--expert-form", self.expert_form, FORMS)
        check_one_of("--freeze", self.freeze, FREEZES)
        check_at_least("--num-experts", self.num_experts, 1)
        check_at_least("--expert-sublayers", self.expert_sublayers, 1)
        self.check_hash(self.num_experts)
        self.check_gate()
        self.check_stable()
        self.check_topk(self.num_experts, self.experts_per_token)
        self.check_batch_routers(self.routers, self.num_experts, self.capacity_factor, self.eval_capacity_factor)
        self.check_memory()
        check_at_least("--swiglu-limit", self.swiglu_limit, 0)
        if self.multi_hash > 1 and self.expert_form != "plain":
            raise UserError(f"--multi-hash {self.multi_hash} needs --expert-form plain")
        if self.sparse_placement == "insert":
            others = {
                f"--multi-hash {self.multi_hash}": self.multi_hash > 1,
                f"--expert-form {self.expert_form}": self.expert_form != "plain",
                "--shared-expert": self.shared_expert,
                "--expert-layer-norm": self.expert_layer_norm,
            }
            instead = "needs experts in place of an FFN; use --sparse-placement replace"
            refuse({f"{name} {instead}": is_given for name, is_given in others.items()})
        check_at_least("--capacity-factor", self.capacity_factor, 0)
        check_at_least("--eval-capacity-factor", self.eval_capacity_factor, 0)
        check_at_least("--expert-parallel-size", self.expert_parallel_size, 0)
        check_probability("--router-jitter", self.router_jitter)
        if self.expert_dropout is not None:
            check_probability("--expert-dropout", self.expert_dropout)

    def check_replicas(self) -> None:
        """Raise `UserError` where replicas of experts do not go with another option."""
        check_at_least("--expert-replicas", self.expert_replicas, 0)
        if not (self.expert_replicas and self.is_sparse):
            return
        given = f"--expert-replicas {self.expert_replicas}"
        refuse(
            {
                f"{given} copies the experts with the largest loads; give these by --expert-placement {BALANCED}, or a "
                "file of them": self.expert_placement == CONTIGUOUS,
                f"{given} does not go with --expert-dispatch {self.expert_dispatch}; use all-to-all": (
                    self.expert_dispatch != DEFAULT
                ),
                f"{given} does not go with --memory-layers, whose rows would be copied, too; leave one of them out": (
                    self.has_memory
                ),
            }
        )
