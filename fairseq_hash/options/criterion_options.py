"""Options of the criterion `hash_moe`, and what the trainer knows of a criterion like it."""

from dataclasses import dataclass, fields

from fairseq.criterions.cross_entropy import CrossEntropyCriterionConfig

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.options import flag_of, option
from fairseq_hash.core.validators import check_at_least


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
    monitor_interval: int = option(
        0,
        "every so many updates, measure each sparse layer's experts: percentiles and entropy of the load, drops, norms "
        "of gradients and weights, dead experts, seconds and bytes of the exchange; into the log, TensorBoard and "
        "SAVE_DIR/experts.jsonl, with a warning for experts that are dead or overloaded for long; 0: never",
    )
    monitor_patience: int = option(
        5,
        "warn of an expert that is dead (less than a hundredth of the mean load) or overloaded in so many measurements "
        "of --monitor-interval in a row, 1 or more",
    )
    monitor_overload: float = option(
        3.0, "load over the mean load above which --monitor-interval calls an expert overloaded, more than 1"
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
        monitor: how the experts are measured; None: not at all.
    """

    update_freq_ranks: int = 0
    monitor: "MonitorOptions | None" = None


@dataclass(frozen=True)
class MonitorOptions:
    """The options `--monitor-*` of a training that measures its experts."""

    interval: int
    patience: int
    overload: float


def monitor_options(interval: int, patience: int, overload: float) -> "MonitorOptions | None":
    """Return how a training measures its experts; None where `interval` is 0.

    Raises:
        UserError: for a value out of range, and for one that does nothing without an interval.
    """
    check_at_least("--monitor-interval", interval, 0)
    check_at_least("--monitor-patience", patience, 1)
    if not 1 < overload < float("inf"):
        raise UserError(f"--monitor-overload {overload} is out of range; give a number above 1")
    defaults = {f.name: f.default for f in fields(HashMoECriterionConfig)}
    for name, value in (("monitor_patience", patience), ("monitor_overload", overload)):
        if not interval and value != defaults[name]:
            raise UserError(
                f"{flag_of(name)} {value} does nothing without --monitor-interval; give one, or leave it out"
            )
    return MonitorOptions(interval, patience, overload) if interval else None
