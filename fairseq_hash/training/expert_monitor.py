"""What `--monitor-interval` measures: load, drops, gradients, weights and exchange of every expert, now and then.

Between two measurements it adds up the loads, on the device. At a measurement the ranks add up what each of them knows,
in two reductions, and rank 0 waits for the result. Shape suffixes: see `moe.losses`; here also N sparse layers.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.layer_meter import LayerMeter
from fairseq_hash.moe.routers import statistics_of
from fairseq_hash.moe.routing_stats import RoutingReport, of_log_key
from fairseq_hash.training.expert_alarm import ExpertAlarm
from fairseq_hash.training.expert_summary import logged, summary
from fairseq_hash.training.monitor_file import MonitorFile

logger = logging.getLogger(__name__)


class ExpertMonitor:
    """Measures the sparse layers of one training; every rank has one and calls it in the same updates.

    Attributes:
        latest: the last measurement as it is logged, `layer1_load_p50` to a number; on rank 0.
    """

    def __init__(self, model: nn.Module, interval: int, alarm: ExpertAlarm, file: MonitorFile) -> None:
        """Take the layers of a model; `interval` is in updates."""
        self.layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
        self.interval = interval
        self.alarm = alarm
        self.file = file
        self.latest: dict[str, float] = {}
        self.is_first_rank = not dist.is_initialized() or dist.get_rank() == 0
        self._sums: dict[str, Tensor] = {}
        self._updates = 0
        self._gradient_NE: Tensor | None = None
        self._is_due = False
        self._has_begun = False

    def begin(self, update: int) -> None:
        """Begin an update, counted from 1; if it is to be measured, the layers count from here on."""
        if not self._has_begun and self.is_first_rank:
            for record in self.file.resume(update - 1):
                self.alarm.hear(record)  # what has lasted goes on lasting
        self._has_begun = True
        self._gradient_NE = None
        self._is_due = update % self.interval == 0
        for layer in self.layers:
            layer.meter = LayerMeter() if self._is_due else None

    @torch.no_grad()
    def see_gradients(self, optimizer: Any) -> None:
        """Take the norms of a measured update's gradients: reduced and scaled to the mean, not yet clipped."""
        if self._is_due:
            self._gradient_NE = self._of_all_experts(True) * gradient_factor(optimizer)

    @torch.no_grad()
    def end(self, update: int, logging_outputs: Sequence[dict[str, Any]]) -> bool:
        """End an update with what the criterion logged of it, and return whether it was measured."""
        for key in logging_outputs[0]:
            if of_log_key(key):
                total = sum(output[key] for output in logging_outputs)
                self._sums[key] = self._sums[key] + total if key in self._sums else total
        self._updates += 1
        if not self._is_due or self._gradient_NE is None:
            return False
        self._measure(update)
        for layer in self.layers:
            layer.meter = None
        self._sums, self._updates, self._is_due = {}, 0, False
        return True

    def _measure(self, update: int) -> None:
        device = self._gradient_NE.device
        experts = self.layers[0].parallel.num_experts
        meters = [layer.meter for layer in self.layers]
        counts_N2E = torch.stack([meter.total_2E(experts, device) for meter in meters])
        norms_N2E = torch.stack([self._gradient_NE, self._of_all_experts(False)], dim=1)
        exchanged_N2 = [(meter.exchange.seconds(), float(meter.exchange.bytes)) for meter in meters]
        exchanged_N2 = torch.tensor(exchanged_N2, dtype=torch.float64, device=device)
        slowest_N = exchanged_N2[:, 0].clone()
        known = torch.cat([counts_N2E.flatten(), norms_N2E.flatten(), exchanged_N2.flatten()])
        ranks = 1
        if dist.is_initialized() and (ranks := dist.get_world_size()) > 1:
            dist.all_reduce(known)
            dist.all_reduce(slowest_N, dist.ReduceOp.MAX)
        if not self.is_first_rank:
            return
        layers = len(self.layers)
        known = known.cpu().numpy()
        counts_N2E, norms_N2E = (known[: layers * 4 * experts]).reshape(2, layers, 2, experts)
        exchanged_N2 = known[layers * 4 * experts :].reshape(layers, 2)
        records = []
        keys = sorted(self._sums, key=of_log_key)
        for place, (layer, key) in enumerate(zip(self.layers, keys, strict=True)):
            number, router = of_log_key(key)
            report = RoutingReport(self._sums[key].cpu().double(), statistics_of(router))
            record = {"update": update, "layer": number, "router": router, "updates": self._updates}
            record |= {"tokens": int(report.tokens), "dropped": float(report.mean(report.dropped))}
            record["load"] = (report.relative_load_E / experts).tolist()
            chosen_E, dropped_E = counts_N2E[place]
            record["drop"] = (dropped_E / chosen_E.clip(min=1)).tolist()
            for name, norm_E in zip(("gradient_norm", "weight_norm"), norms_N2E[place], strict=True):
                record[name] = [value if np.isfinite(value) else None for value in norm_E.tolist()]
            seconds, size = exchanged_N2[place].tolist() if layer.dispatcher.is_metered else (None, None)
            record["exchange_seconds"] = None if seconds is None else slowest_N[place].item()
            record["exchange_seconds_mean"] = None if seconds is None else seconds / ranks
            record["exchange_bytes"] = None if size is None else int(size)
            records.append(record | summary(record))
        self.file.append(records)
        self.latest = {f"layer{r['layer']}_{name}": value for r in records for name, value in logged(r).items()}
        for record in records:
            for line in self.alarm.hear(record):
                logger.warning(line)

    def _of_all_experts(self, of_gradients: bool) -> Tensor:
        """Return the norms of this rank's experts, fp64 `[N, E]`; zero for those that another rank measures.

        Replicas agree, so the first group measures, and of copies in a group the first. An expert without a gradient
        (`--freeze`) has NaN.
        """
        rows = []
        for layer in self.layers:
            parallel = layer.parallel
            norm_E = next(layer.experts.parameters()).new_zeros(parallel.num_experts, dtype=torch.float64)
            if parallel.rank < parallel.size:
                norm_e = expert_norms(layer.experts, of_gradients).double()
                held, own = list(parallel.expert_ids), parallel.first_experts
                place_e = torch.tensor([held.index(expert) for expert in own], device=norm_E.device)
                norm_E[torch.tensor(own, device=norm_E.device)] = norm_e[place_e]
            rows.append(norm_E)
        return torch.stack(rows)


def expert_norms(experts: nn.Module, of_gradients: bool) -> Tensor:
    """Return the L2 norm of each expert's weights, or of its gradient (fp32, `[e]`); NaN where there is no gradient."""
    tensors = [p.grad if of_gradients else p for p in experts.parameters()]
    tensors = [tensor for tensor in tensors if tensor is not None]
    if not tensors:
        parameter = next(experts.parameters())
        return parameter.new_full((len(parameter),), torch.nan, dtype=torch.float32)
    norms = [torch.linalg.vector_norm(tensor.flatten(1), dim=1, dtype=torch.float32) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)


def gradient_factor(optimizer: Any) -> "Tensor | float":
    """Return what makes of the parameters' gradients, before clipping, those of the mean loss.

    In half precision fairseq's optimizers put off the multiplication; AMP's scaler puts off its division.
    """
    if hasattr(optimizer, "_multiply_factor"):
        return optimizer._multiply_factor
    scale = getattr(getattr(optimizer, "_grad_scaler", None), "_scale", None)
    return 1.0 if scale is None else 1.0 / scale
