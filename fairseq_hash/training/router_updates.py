"""Routers that keep state: after each update they learn which experts the tokens chose."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.routers import statistics_of
from fairseq_hash.moe.routing_stats import RoutingReport, of_log_key, update_key


def update_routers(model: nn.Module, logging_outputs: Sequence[dict[str, Any]]) -> None:
    """Call `after_update` of every router that has it.

    `logging_outputs` is what the criterion `hash_moe` logged of the update: one for each of this rank's batches, or the
    sum over all ranks. The model's sparse layers are in the order of their numbers.
    """
    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
    if not any(hasattr(layer.router, "after_update") for layer in layers):
        return
    keys = sorted((key for key in logging_outputs[0] if of_log_key(key)), key=of_log_key)
    for layer, key in zip(layers, keys, strict=True):
        if hasattr(layer.router, "after_update"):
            names = [name for name in (key, update_key(key)) if name in logging_outputs[0]]
            sums, *update_sums_N = (sum(output[name] for output in logging_outputs) for name in names)
            chosen_E = RoutingReport(sums, statistics_of(of_log_key(key)[1])).tokens_per_expert_E
            layer.router.after_update(chosen_E, *update_sums_N)
