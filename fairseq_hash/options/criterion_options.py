"""Options of the criterion `hash_moe`, and what the trainer knows of a criterion like it."""

from dataclasses import dataclass

from fairseq.criterions.cross_entropy import CrossEntropyCriterionConfig

from fairseq_hash.core.options import option


@dataclass
class HashMoECriterionConfig(CrossEntropyCriterionConfig):
    """Weights of the auxiliary losses, relative to the cross-entropy of one token in nats."""

    load_balance_weight: float = option(
        0.01,
        "weight of the load-balancing loss of each sparse layer with a switch, gshard or stablemoe router, or a topk "
        "router with --balancing loss, 0 or more (0.3 in StableMoE)",
    )
    z_loss_weight: float = option(
        0.0, "weight of the z-loss of each sparse layer with a switch or topk router, 0 or more (0.001 in ST-MoE)"
    )
    sequence_loss_weight: float = option(
        0.0001, "weight of --sequence-loss of each sparse layer with a topk router, 0 or more (0.0001 in DeepSeek-V3)"
    )
    distill_weight: float = option(
        0.3,
        "weight of the loss with which a stablemoe router distils its routing onto token ids, 0 or more (0.3 in the "
        "authors' release)",
    )
    log_expert_loads: bool = option(
        False,
        "also log each expert's share of the tokens, for every sparse layer: as a list in the JSON log, and as a "
        "histogram in TensorBoard",
    )
    update_freq_ranks: int = option(
        0,
        "number of ranks N for which --update-freq F is meant: W ranks accumulate F * N / W batches each, so that an "
        "update has the same number of tokens on any number of ranks; 0: F batches on any number",
    )


class SparseCriterion:
    """A criterion that knows sparse layers, as `hash_moe` does.

    It adds the routers' auxiliary losses, counts the tokens of each expert, and calls an oracle's perplexity one.

    Attributes:
        update_freq_ranks: the number of ranks that `--update-freq` is meant for; 0: any.
    """

    update_freq_ranks: int = 0
