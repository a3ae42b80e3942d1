"""TensorBoard: what each number means, and the experts' loads as histograms."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import tensorboard
from torch.utils.tensorboard.summary import Summary, histogram, scalar

from fairseq_hash.fairseq_patches.registry import override, replacement
from fairseq_hash.moe.routers import router_names, statistics_of
from fairseq_hash.moe.routing_stats import OF_MONITOR, meanings

# What fairseq and the criterion `hash_moe` log, over a log interval (`train_inner`), an epoch or a validation.
DESCRIPTIONS = {
    "loss": "what is minimised: cross-entropy and weighted auxiliary losses, in bits a token",
    "nll_loss": "cross-entropy alone, in bits a token",
    "ppl": "perplexity per token of the dictionary, of the cross-entropy alone",
    "oracle_ppl": "perplexity of a model that sees the next token: not a language model's",
    "best_loss": "the lowest validation loss so far",
    "wps": "tokens a second, over all ranks",
    "ups": "updates a second",
    "wpb": "tokens an update, over all ranks",
    "bsz": "samples an update, over all ranks",
    "lr": "learning rate",
    "gnorm": "norm of the gradients before clipping, experts included",
    "clip": "share of the updates whose gradients were clipped, in percent",
    "loss_scale": "scale of the loss in half precision",
    "train_wall": "seconds spent in updates",
    "gb_free": "free memory of the first rank's GPU, in GiB",
    "peak_gb": "peak memory of the first rank, of its GPU where there is one, in GB",
    "wall": "seconds since this session began",
}
# The same of a sparse layer: `layer3_load_max`. A router's own statistics say themselves what they are.
OF_LAYER = {
    "load_max": "largest demand for an expert over the mean demand; 1: every expert the same",
    "load_min": "smallest demand for an expert over the mean demand; 0: an expert that no token goes to",
    "load_cv": "coefficient of variation of the demand for the experts; 0: every expert the same",
    "dropped": "share of the tokens that found their expert full",
    "load": "how many experts have which load over the uniform share; all at 1: every expert the same",
}


def description_of(tag: str) -> str:
    """Return what a number's name means, "" where that is not known."""
    if of_layer := re.fullmatch(r"layer(\d+)_(\w+)", tag):
        own = {name: text for router in router_names() for name, text in meanings(statistics_of(router)).items()}
        known = {**OF_LAYER, **OF_MONITOR, **own}.get(of_layer[2])
        return f"Layer {of_layer[1]} (the first is 0): {known}" if known else ""
    return DESCRIPTIONS.get(tag, "")


class DescribingWriter(tensorboard.SummaryWriter):
    """A writer that says what a number means where it is written first, for TensorBoard's cards."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._described: set[str] = set()

    def add_scalar(self, tag: str, scalar_value: float, global_step: "int | None" = None, **options: Any) -> None:
        """Write a number, as the class above does."""
        if tag in self._described or not description_of(tag) or options:
            super().add_scalar(tag, scalar_value, global_step, **options)
        else:
            self._add_described(scalar(tag, scalar_value), "scalars", global_step)

    def add_loads(self, tag: str, load_E: Tensor, global_step: int) -> None:
        """Write a histogram of loads; `load_E` is each expert's share of the tokens."""
        relative_E = (load_E * len(load_E)).cpu().numpy()
        self._add_described(histogram(tag, relative_E, self.default_bins), "histograms", global_step)

    def _add_described(self, summary: Summary, plugin: str, step: "int | None") -> None:
        (value,) = summary.value
        if value.tag not in self._described:
            self._described.add(value.tag)
            value.metadata.plugin_data.plugin_name = plugin
            value.metadata.summary_description = description_of(value.tag)
        self._get_file_writer().add_summary(summary, step)


@replacement("fairseq.logging.progress_bar", "SummaryWriter")
def _describe(original: Any) -> Any:
    """Say what each number means.

    Upstream: `TensorboardProgressBarWrapper._writer` makes this writer, whose numbers have names alone. If tensorboard
    is missing it is tensorboardX's or None, and stays.
    """
    return DescribingWriter if original is tensorboard.SummaryWriter else original


@override("fairseq.logging.progress_bar.TensorboardProgressBarWrapper", "_log_to_tensorboard")
def _log_loads(
    original: Callable[..., None], bar: Any, stats: dict[str, Any], tag: "str | None" = None, step: "int | None" = None
) -> None:
    """Write the experts' loads (`--log-expert-loads`) as histograms.

    Upstream: `_log_to_tensorboard` writes numbers and leaves out what has several values.
    """
    writer = bar._writer(tag or "")
    if isinstance(writer, DescribingWriter):
        for key, value in stats.items():
            if torch.is_tensor(value) and value.dim() == 1 and value.numel() > 1:
                writer.add_loads(key, value, stats["num_updates"] if step is None else step)
    original(bar, stats, tag, step)
