"""Stopping on a signal."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer

from fairseq_hash.fairseq_patches.registry import override, replacement
from fairseq_hash.training.stop_signals import end_by_parent_only, interrupt_in_one_line, stop_signals

logger = logging.getLogger(__name__)


@override("fairseq.trainer.Trainer", "__init__")
def _listen(original: Callable[..., None], trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    """Listen for signals from here on.

    Upstream: signals end the process wherever it is.
    """
    original(trainer, *args, **kwargs)
    stop_signals()


@override("fairseq_cli.train", "train")
def _finish_update(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Let a Ctrl-C wait for the end of an update.

    Upstream: a traceback, and what was trained since the last checkpoint is lost. `train` goes through one epoch.
    """
    with stop_signals().training():
        return original(*args, **kwargs)


@override("fairseq_cli.train", "validate_and_save")
def _stop_after_update(
    original: Callable[..., Any], cfg: Any, trainer: Trainer, task: Any, epoch_itr: Any, *args: Any, **kwargs: Any
) -> Any:
    """Save and end after an update, where any rank got a signal.

    Upstream: `validate_and_save` is called after every update, by all ranks. What is due is done first: a validation
    left out would change the best checkpoint. None is added, because the time until SIGKILL is short.
    """
    valid_losses, is_over = original(cfg, trainer, task, epoch_itr, *args, **kwargs)
    if is_over:
        return valid_losses, is_over
    number = stop_signals().agreed(trainer.device)
    if number is None:
        return valid_losses, is_over
    if trainer.hash_state.saved_update != trainer.get_num_updates():
        checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
    if cfg.checkpoint.write_checkpoints_asynchronously:
        PathManager.async_close()
    if dist.is_initialized():
        dist.barrier()  # a launcher ends all ranks when the first one goes
    logger.info("stopped by %s at update %d; %s", number.name, trainer.get_num_updates(), _what_was_saved(cfg, trainer))
    stop_signals().hand_on(number)


def _what_was_saved(cfg: Any, trainer: Trainer) -> str:
    """Return in words what there is to go on from."""
    if cfg.checkpoint.no_save or cfg.checkpoint.no_last_checkpoints:
        option = "--no-save" if cfg.checkpoint.no_save else "--no-last-checkpoints"
        return f"no checkpoint_last.pt was saved ({option})"
    path = Path(cfg.checkpoint.save_dir) / f"checkpoint_last{trainer.checkpoint_suffix or ''}.pt"
    restored = cfg.checkpoint.restore_file
    if restored not in ("checkpoint_last.pt", os.fspath(path)):
        return f"saved {path}; to go on from it leave out --restore-file {restored}"
    return f"saved {path}, from which the same command goes on"


@override("fairseq.checkpoint_utils", "save_checkpoint")
def _remember_update(original: Callable[..., None], cfg: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    """Note what has been saved.

    Upstream: the training loop does not tell whether it has saved after an update.
    """
    original(cfg, trainer, *args, **kwargs)
    trainer.hash_state.saved_update = trainer.get_num_updates()


@override("torch.utils.data._utils.worker", "_worker_loop")
def _keep_working(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Let data loader workers live until the process that started them ends them.

    Upstream: torch's handler in a worker takes SIGTERM from anyone, and SLURM sends it to all processes of a job, as
    a terminal does with SIGINT. The training then fails for want of data before it can save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "SLURM_JOB_ID" in os.environ:
        end_by_parent_only()
    original(*args, **kwargs)


def _is_command() -> bool:
    """Return whether this process is one of fairseq's commands: `fairseq-train`, or `python -m fairseq_cli.train`."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    name = Path(getattr(main, "__file__", None) or "").name if spec is None else spec.name
    return name.startswith(("fairseq-", "fairseq_cli."))


@replacement("sys", "excepthook")
def _show_interrupt_in_one_line(original: Callable[..., None]) -> Callable[..., None]:
    """Let a Ctrl-C end one of fairseq's commands with one line.

    Upstream: a traceback. Programs have handlers of their own, or none.
    """
    return interrupt_in_one_line(original) if _is_command() else original
