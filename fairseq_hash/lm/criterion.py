"""The criterion `hash_moe`: token cross-entropy, the routers' auxiliary losses, and what the sparse layers did."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from fairseq import metrics, utils
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.logging.meters import MetersDict
from fairseq.models import BaseFairseqModel, FairseqDecoder
from fairseq.tasks import FairseqTask
from torch import Tensor, nn

from fairseq_hash.core.options import flag_of
from fairseq_hash.core.validators import check_at_least
from fairseq_hash.lm.token_loss import adaptive_cross_entropy, token_cross_entropy
from fairseq_hash.moe.routers import statistics_of
from fairseq_hash.moe.routing_stats import RoutingReport, log_key, loss_weights, names_of, of_log_key, update_key
from fairseq_hash.options.criterion_options import HashMoECriterionConfig, SparseCriterion, monitor_options
from fairseq_hash.parallel.collectives import one_line_errors
from fairseq_hash.provenance import peak_gigabytes


@register_criterion("hash_moe", dataclass=HashMoECriterionConfig)
class HashMoECriterion(SparseCriterion, CrossEntropyCriterion):
    """Cross-entropy plus the auxiliary losses of every sparse layer.

    Both are sums over tokens, divided by the same number in the end: their ratio does not change with gradient
    accumulation, the batch size or the number of ranks. (The load-balancing loss itself is taken over each rank's
    batch, as published.) Validation adds no auxiliary loss, so `best` is chosen by cross-entropy.
    """

    @one_line_errors
    def __init__(
        self,
        task: FairseqTask,
        sentence_avg: bool,
        load_balance_weight: float,
        z_loss_weight: float,
        log_expert_loads: bool,
        update_freq_ranks: int = 0,
        distill_weight: float = 0.3,
        sequence_loss_weight: float = 0.0001,
        monitor_interval: int = 0,
        monitor_patience: int = 5,
        monitor_overload: float = 3.0,
    ) -> None:
        super().__init__(task, sentence_avg)
        check_at_least("--update-freq-ranks", update_freq_ranks, 0)
        self.loss_weights = {
            "load_balance_weight": load_balance_weight,
            "z_loss_weight": z_loss_weight,
            "distill_weight": distill_weight,
            "sequence_loss_weight": sequence_loss_weight,
        }
        for name, weight in self.loss_weights.items():
            check_at_least(flag_of(name), weight, 0)
        self.log_expert_loads = log_expert_loads
        self.monitor = monitor_options(monitor_interval, monitor_patience, monitor_overload)
        self.update_freq_ranks = update_freq_ranks

    def forward(
        self, model: nn.Module, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """Return the loss (a sum over tokens, nats), the sample size, and logging outputs that add up over ranks."""
        net_output = model(**sample["net_input"])
        nll_loss, _ = self.compute_loss(model, net_output, sample, reduce=reduce)
        reports: dict[tuple[int, str], Tensor] = net_output[1].get("routing", {})
        loss = nll_loss
        if self.training:
            for (_, router), sums in reports.items():
                report = RoutingReport(sums, statistics_of(router))
                for name, weight in loss_weights(report.statistics).items():
                    loss = loss + self.loss_weights.get(weight, weight) * report.total(name)
        sentences = sample["target"].size(0)
        sample_size = sentences if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "loss": loss.detach(),
            "nll_loss": nll_loss.detach(),
            "ntokens": sample["ntokens"],
            "nsentences": sentences,
            "sample_size": sample_size,
        }
        for layer, sums in sorted(reports.items()):
            logging_output[log_key(*layer)] = sums.detach().double()
        for layer, sums_N in sorted(net_output[1].get("update_sums", {}).items()):
            logging_output[update_key(log_key(*layer))] = sums_N.double()
        if net_output[1].get("is_oracle", False):
            logging_output["_is_oracle"] = 1
        if self.log_expert_loads:
            logging_output["_log_expert_loads"] = 1
        return loss, sample_size, logging_output

    def compute_loss(
        self, model: nn.Module, net_output: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy twice, as fairseq does: the sum over tokens (nats), or one a token."""
        softmax = getattr(getattr(model, "decoder", None), "adaptive_softmax", None)
        if softmax is not None:
            target_N = model.get_targets(sample, net_output).view(-1)
            feature_ND = net_output[0].reshape(len(target_N), -1)
            loss = adaptive_cross_entropy(softmax, feature_ND, target_N, ignore_index=self.padding_idx, reduce=reduce)
            return loss, loss
        if not has_plain_logits(model, net_output):
            return super().compute_loss(model, net_output, sample, reduce=reduce)
        logits_BLV = net_output[0]
        target_N = model.get_targets(sample, net_output).view(-1)
        loss = token_cross_entropy(
            logits_BLV.reshape(-1, logits_BLV.size(-1)), target_N, ignore_index=self.padding_idx, reduce=reduce
        )
        return loss, loss

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Log the mean losses in bits, `ppl` of the cross-entropy alone, and the statistics of each sparse layer.

        The statistics come from sums over batches and ranks: over a log interval, an epoch or a validation set.
        """
        loss, nll_loss, tokens, sample_size = (
            _total(logging_outputs, key) for key in ("loss", "nll_loss", "ntokens", "sample_size")
        )
        metrics.log_scalar("loss", loss / sample_size / math.log(2), sample_size, round=3)
        metrics.log_scalar("nll_loss", nll_loss / tokens / math.log(2), tokens, round=3)
        # Of a model that sees what it is to predict, nobody shall read a language model's perplexity.
        perplexity = "oracle_ppl" if any("_is_oracle" in log for log in logging_outputs) else "ppl"
        metrics.log_derived(perplexity, lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
        metrics.log_derived("peak_gb", lambda meters: round(peak_gigabytes(), 3), priority=650)
        list_loads = any("_log_expert_loads" in log for log in logging_outputs)
        for key in logging_outputs[0] if logging_outputs else ():
            if of_log_key(key):
                metrics.log_scalar_sum(key, _total(logging_outputs, key))
                for name, value in layer_statistics(key, list_loads).items():
                    metrics.log_derived(name, value, priority=600)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Return True: every logging output is a sum."""
        return True


def has_plain_logits(model: nn.Module, net_output: Any) -> bool:
    """Return whether fairseq would take the log-softmax of `net_output[0]` as this model's log-probabilities.

    A model with an adaptive softmax or with a `get_normalized_probs` of its own has others. Bound methods are compared:
    they reach through the modules that data parallelism wraps around a model.
    """
    decoder = getattr(model, "decoder", None)
    is_fairseqs = all(
        getattr(getattr(module, name, None), "__func__", None) is getattr(base, name)
        for module, base in ((model, BaseFairseqModel), (decoder, FairseqDecoder))
        for name in ("get_normalized_probs", "get_normalized_probs_scriptable")
    )
    return (
        is_fairseqs
        and getattr(decoder, "adaptive_softmax", None) is None
        and isinstance(net_output, tuple)
        and torch.is_tensor(net_output[0])
        and net_output[0].is_floating_point()
    )


def _total(logging_outputs: Iterable[dict[str, Any]], key: str) -> Any:
    return sum(log.get(key, 0) for log in logging_outputs)


def layer_statistics(key: str, list_loads: bool) -> dict[str, Callable[[MetersDict], Any]]:
    """Return what to log of the summed report under the meter `key`: names, and functions of fairseq's meters.

    `load_max` and `load_min`: largest and smallest number of tokens that chose an expert, over the mean; `load_cv`: the
    coefficient of variation of these numbers; `dropped`: share of the tokens dropped; `load`: each expert's share of
    the tokens. A router's own statistics follow under their names, as means over tokens.
    """
    layer, router = of_log_key(key)
    kind = statistics_of(router)
    statistics: dict[str, Callable[[RoutingReport], Tensor]] = {
        "load_max": lambda report: report.relative_load_E.max(),
        "load_min": lambda report: report.relative_load_E.min(),
        "load_cv": lambda report: report.relative_load_E.std(correction=0),
        "dropped": lambda report: report.mean(report.dropped),
    }
    for name in names_of(kind):
        statistics[name] = lambda report, name=name: report.mean(report.total(name))
    if list_loads:
        statistics["load"] = lambda report: report.relative_load_E / len(report.relative_load_E)

    def of_meter(statistic: Callable[[RoutingReport], Tensor]) -> Callable[[MetersDict], Any]:
        def value(meters: MetersDict) -> Any:
            result = statistic(RoutingReport(torch.as_tensor(meters[key].sum), kind)).round(decimals=5)
            # TensorBoard takes numbers; the JSON log takes a vector as well.
            return result.item() if result.dim() == 0 else result

        return value

    return {f"layer{layer}_{name}": of_meter(statistic) for name, statistic in statistics.items()}
