"""Warns of experts that almost no token goes to, or too many, for long: one line, with what helps."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

DEAD_LOAD = 0.01  # of the mean load
MOST_NAMED = 8  # experts in one line

EVEN_TABLE = "--hash-table balanced or scattered spreads the training text's tokens evenly (fairseq-hash tables)"
RAISE_LOSS = "raise --load-balance-weight"
# What helps, by the router's name. Others are told the general remedy.
REMEDIES = {
    "hash": EVEN_TABLE,
    "switch": f"{RAISE_LOSS}, or --router-jitter",
    "gshard": RAISE_LOSS,
    "stablemoe": f"{RAISE_LOSS}, before --stable-updates are over",
    "topk": f"{RAISE_LOSS} (--balancing loss), raise --bias-step (--balancing bias), or use --balancing quantile",
    "base": "its balance is of training batches: --base-balance global, or larger batches",
    "sinkhorn": "more --sinkhorn-iterations, or --sinkhorn-balance global",
    "expert-choice": "each expert takes as many tokens of each batch: larger batches",
    "random-linear": "it does not learn: another --seed, or a router that is balanced (topk, switch)",
}
GENERAL = "balance this router, or take fewer experts (--num-experts)"


@dataclass
class ExpertAlarm:
    """Counts for how many measurements in a row each expert has been dead or overloaded.

    An expert is named when that has lasted `patience` measurements, and again only after it was in order in between.

    Attributes:
        patience: measurements in a row, 1 or more.
        overload: load over the mean load above which an expert is overloaded, more than 1.
    """

    patience: int
    overload: float
    lasted: dict[tuple[int, str], np.ndarray] = field(default_factory=dict)

    def hear(self, record: Mapping[str, Any]) -> list[str]:
        """Return the warnings that a record of the monitor's file gives rise to, one line for each kind."""
        relative_E = np.array(record["load"]) * len(record["load"])
        lines = []
        kinds = {"dead": relative_E < DEAD_LOAD, "overloaded": relative_E > self.overload}
        for kind, has_it_E in kinds.items() if relative_E.any() else ():
            key = (record["layer"], kind)
            lasted_E = self.lasted.get(key)
            if lasted_E is None or len(lasted_E) != len(has_it_E):
                lasted_E = np.zeros(len(has_it_E), dtype=np.int64)
            self.lasted[key] = lasted_E = np.where(has_it_E, lasted_E + 1, 0)
            experts = np.flatnonzero(lasted_E == self.patience)
            if len(experts):
                lines.append(self._line(record, kind, experts, relative_E))
        return lines

    def _line(self, record: Mapping[str, Any], kind: str, experts: np.ndarray, relative_E: np.ndarray) -> str:
        named = ", ".join(map(str, experts[:MOST_NAMED])) + (", ..." if len(experts) > MOST_NAMED else "")
        several = len(experts) > 1
        what = f"expert{'s' if several else ''} {named} of {len(relative_E)}"
        if kind == "dead":
            state = f"got less than {DEAD_LOAD:g} of the mean load"
        else:
            state = f"got more than {self.overload:g} times the mean load (now {relative_E[experts].max():.1f})"
        remedy = REMEDIES.get(record["router"], GENERAL)
        if kind == "overloaded" and record["dropped"]:
            remedy += f"; a larger --capacity-factor drops fewer tokens ({record['dropped']:.1%} now)"
        return (
            f"layer {record['layer']} ({record['router']}), update {record['update']}: {what} {state} in "
            f"{self.patience} measurements in a row; {remedy}"
        )
