"""What the sparse layers did to a batch: counts of tokens, and what a router wants logged, under names of its own.

A router declares its statistics as a dataclass of scalars:

    @dataclass(frozen=True)
    class Statistics:
        margin: Tensor = statistic("mean difference of the two largest scores")

From there each goes under its name to the log, to TensorBoard with its meaning, and, where it has a `loss_weight`, into
the loss. Shape suffixes: see `losses`.
"""

import re
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.dispatch_plan import DispatchPlan

COUNTS = ("tokens", "dropped")  # of every layer, before its router's own statistics
OF_ALL_LAYERS = ("load", "load_max", "load_min", "load_cv", "dropped")  # logged of every layer, under these names
_OF_NORMS = {"min": "smallest", "p10": "10th percentile of the", "p50": "median", "p90": "90th percentile of the"}
_OF_NORMS["max"] = "largest"
# What `--monitor-interval` logs of every layer besides, and what it means; the last measurement's.
OF_MONITOR = {
    **{f"load_p{q}": f"{q} % of the experts have at most this demand, over the mean demand" for q in (10, 50, 90)},
    "load_entropy": "entropy of the demand over that of an even one; 1: every expert the same, 0: one expert has all",
    "dead_experts": "experts with less than a hundredth of the mean demand",
    "drop_max": "the largest share of its tokens that an expert dropped",
    **{
        f"{what}_norm_{name}": f"{which} norm of {text}"
        for what, text in (("gradient", "an expert's gradient, before clipping"), ("weight", "an expert's weights"))
        for name, which in _OF_NORMS.items()
    },
    "exchange_seconds": "seconds of the measured update in the all-to-all, of the rank with the most, waiting included",
    "exchange_mb": "megabytes that the all-to-all of the measured update moved between ranks, all ranks together",
}


def statistic(meaning: str, loss_weight: "str | float | None" = None) -> Any:
    """Return a field of a router's statistics: an fp32 scalar, the mean over the tokens of a batch.

    Args:
        meaning: for readers of TensorBoard, with unit and scale.
        loss_weight: what it is multiplied by and added to the training's loss with: a number, or the name of an option
            of the criterion `hash_moe`; None: it is logged only.
    """
    return field(metadata={"meaning": meaning, "loss_weight": loss_weight})


@dataclass(frozen=True)
class NoStatistics:
    """The statistics of a layer whose router has none, such as a hash layer."""


def names_of(statistics: type) -> tuple[str, ...]:
    """Return the names of a router's statistics, in their order."""
    return tuple(f.name for f in fields(statistics))


def loss_weights(statistics: type) -> "dict[str, str | float]":
    """Return what the statistics that are losses are weighted with, by their names."""
    return {f.name: f.metadata["loss_weight"] for f in fields(statistics) if f.metadata["loss_weight"] is not None}


def meanings(statistics: type) -> dict[str, str]:
    """Return what each of a router's statistics means, by its name."""
    return {f.name: f.metadata["meaning"] for f in fields(statistics)}


def log_key(layer: int, router: str) -> str:
    """Return the name of a layer's sums in fairseq's log; fairseq shows no name that starts with an underscore."""
    return f"_layer{layer}|{router}"  # the bar cannot be in a router's name


def update_key(key: str) -> str:
    """Return the name of what a layer's router wants to know after an update, beside `log_key`'s."""
    return f"{key}|update"


def of_log_key(key: str) -> "tuple[int, str] | None":
    """Return the layer and the router of a name in fairseq's log; None if it is of something else."""
    found = re.fullmatch(r"_layer(\d{1,9})\|([^|]+)", key)
    return (int(found[1]), found[2]) if found else None


def report_size(statistics: type, num_experts: int) -> int:
    """Return how many sums a `RoutingReport` has."""
    return len(COUNTS) + len(names_of(statistics)) + num_experts


class RoutingReport(NamedTuple):
    """What one sparse layer did to one batch. Every value is a sum over tokens, so reports of several batches add up.

    Attributes:
        sums: fp32 `[2 + S + E]`, differentiable: tokens, dropped tokens, the router's S statistics, and how many tokens
            chose each expert, before dropping. One vector, because activation checkpointing keeps gradients of tensors
            only.
        statistics: the dataclass of the router's statistics.
    """

    sums: Tensor
    statistics: type = NoStatistics

    @classmethod
    def of(
        cls, assignment: Assignment, plan: DispatchPlan, statistics: type = NoStatistics, segments: int = 1
    ) -> "RoutingReport":
        """Sum up an assignment and its plan, in which each expert has `segments` groups of rows."""
        tokens, chosen_E = plan.shape_TK[0], plan.tokens_per_expert_E
        if segments > 1:
            chosen_E = chosen_E.view(-1, segments).sum(dim=1)
        # Filled in on the device: a tensor made of a number is copied there, and waited for.
        counts = torch.zeros(len(COUNTS), device=chosen_E.device)
        counts[0].fill_(tokens)
        counts[1].fill_(plan.dropped / plan.shape_TK[1])
        means = [getattr(assignment.statistics, name).float() for name in names_of(statistics)]
        totals = [torch.stack(means) * tokens] if means else []
        return cls(torch.cat([counts, *totals, chosen_E.float()]), statistics)

    @property
    def tokens(self) -> Tensor:
        """Number of tokens, padding left out."""
        return self.sums[0]

    @property
    def dropped(self) -> Tensor:
        """Number of tokens that found their expert full; one of K choices counts as 1 / K."""
        return self.sums[1]

    @property
    def tokens_per_expert_E(self) -> Tensor:
        """Number of tokens that chose each expert, before dropping."""
        return self.sums[len(COUNTS) + len(names_of(self.statistics)) :]

    @property
    def relative_load_E(self) -> Tensor:
        """`tokens_per_expert_E` over its mean; zero where there is no token."""
        chosen_E = self.tokens_per_expert_E
        return chosen_E / chosen_E.mean().clamp(min=1e-12)

    def total(self, name: str) -> Tensor:
        """Return one of the router's statistics, summed over the tokens."""
        return self.sums[len(COUNTS) + names_of(self.statistics).index(name)]

    def mean(self, total: Tensor) -> Tensor:
        """Return a total over tokens as a mean; zero where there is no token."""
        return total / self.tokens.clamp(min=1)
