"""The running average of the weights (`--store-ema`)."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from fairseq.models.ema import EMA
from fairseq.trainer import Trainer
from torch import nn

from fairseq_hash.checkpoint.convert import take_running_average
from fairseq_hash.checkpoint.mainfile import read_main
from fairseq_hash.core.errors import UserError
from fairseq_hash.fairseq_patches.registry import override

logger = logging.getLogger(__name__)


@override("fairseq.trainer.Trainer", "__init__", one_line=True)
def _check_average(original: Callable[..., None], trainer: Trainer, cfg: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse an average of weights that no rank has whole.

    Upstream: `EMA` copies the model; one that fully sharded data parallel has wrapped cannot be copied (a traceback
    after the first update).
    """
    if cfg.ema.store_ema and cfg.distributed_training.ddp_backend == "fully_sharded":
        raise UserError("--store-ema does not go with --ddp-backend fully_sharded; use legacy_ddp or pytorch_ddp")
    original(trainer, cfg, *args, **kwargs)


@override("fairseq.models.ema.ema.EMA", "_step_internal")
@torch.no_grad()
def _average_weights(
    original: Callable[..., None], ema: EMA, new_model: nn.Module, updates: "int | None" = None
) -> None:
    """Average what is a floating-point number, each memory once; copy all else, such as hash tables.

    Upstream: buffers of integers are averaged, too (a traceback), and an embedding that is the output projection as
    well (`--share-decoder-input-output-embed`) is averaged twice an update, so that its decay is the square of
    `--ema-decay`. What was averaged then goes through `load_state_dict`, which checks tables and waits for all ranks.
    """
    kept = ema.model.state_dict()
    averages = ema.fp32_params if ema.config.ema_fp32 else kept
    done = set()
    for name, value in new_model.state_dict().items():
        if "version" in name:
            continue
        if name in ema.skip_keys or not value.is_floating_point():
            kept[name].copy_(value)
            continue
        average = averages[name]
        if average.data_ptr() not in done:
            average.mul_(ema.decay).add_(value.to(average.dtype), alpha=1 - ema.decay)
            done.add(average.data_ptr())
        if average is not kept[name]:
            kept[name].copy_(average)


def go_on_averaging(trainer: Trainer, extra_state: Mapping[str, Any]) -> None:
    """Give the trainer the running average of the checkpoint that it has loaded, or begin one with its weights.

    Upstream: `Trainer.load_checkpoint` looks for the weights where it has just deleted them (a traceback), when a
    checkpoint has no average.
    """
    if "ema" not in extra_state:
        logger.info("the checkpoint has no running average (--store-ema): it begins with the checkpoint's weights")
        trainer._build_ema()
        return
    trainer.ema.restore(extra_state["ema"])
    if trainer.cfg.ema.ema_fp32:
        trainer.ema.build_fp32_params(extra_state.get("ema_fp32_params"))


@override("fairseq.checkpoint_utils", "load_ema_from_checkpoint", one_line=True)
def _read_average(original: Callable[..., Any], fpath: str) -> dict[str, Any]:
    """Read a checkpoint whose weights are the running average.

    Upstream: the state keeps the manifest of the shards, from which whoever loads it takes the experts as they were
    trained. A checkpoint without an average is a traceback.
    """
    state = read_main(fpath)
    take_running_average(state, Path(fpath))
    return state
