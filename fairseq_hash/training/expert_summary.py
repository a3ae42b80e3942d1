"""The numbers of one measurement of a sparse layer: of all its experts together, for people, logs and TensorBoard."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fairseq_hash.training.expert_alarm import DEAD_LOAD

PERCENTILES = (10, 50, 90)
OF_NORMS = {"min": 0, "p10": 10, "p50": 50, "p90": 90, "max": 100}


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record's lists say of all experts together: entropy of the load, dead experts, percentiles.

    Percentiles are NumPy's, linear between two experts; those of the load are over the mean load.
    """
    load_E = np.array(record["load"])
    shares = load_E[load_E > 0]
    relative_E = load_E * len(load_E)
    found: dict[str, Any] = {f"load_p{q}": float(np.percentile(relative_E, q)) for q in PERCENTILES}
    found["load_entropy"] = float(-(shares * np.log(shares)).sum() / np.log(len(load_E))) if len(load_E) > 1 else 1.0
    found["dead_experts"] = int((relative_E < DEAD_LOAD).sum())
    found["drop_max"] = max(record["drop"])
    for what in ("gradient_norm", "weight_norm"):
        norms = np.array(record[what], dtype=np.float64)  # None becomes NaN
        for name, q in OF_NORMS.items():
            found[f"{what}_{name}"] = float(np.percentile(norms, q)) if np.isfinite(norms).all() else None
    return found


def logged(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record that go to fairseq's log and to TensorBoard (`routing_stats.OF_MONITOR`)."""
    numbers = {name: record[name] for name in summary(record) if record[name] is not None}
    if record["exchange_seconds"] is not None:
        numbers |= {"exchange_seconds": record["exchange_seconds"], "exchange_mb": record["exchange_bytes"] / 1e6}
    return {name: float(f"{value:.5g}") for name, value in numbers.items()}
