"""The trainer's updates."""

import contextlib
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairseq.logging import metrics
from fairseq.trainer import Trainer
from torch import Tensor, nn

from fairseq_hash.checkpoint.trainer_checkpoints import TrainingCheckpoints
from fairseq_hash.core.errors import UserError
from fairseq_hash.fairseq_patches.registry import override
from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.options.criterion_options import MonitorOptions, SparseCriterion
from fairseq_hash.training.expert_alarm import ExpertAlarm
from fairseq_hash.training.expert_monitor import ExpertMonitor
from fairseq_hash.training.monitor_file import MonitorFile
from fairseq_hash.training.not_finite import blame, experts_not_finite
from fairseq_hash.training.router_updates import update_routers
from fairseq_hash.training.shared_experts import SharedTraining, scaled_update_freq
from fairseq_hash.training.trainer_state import TrainerState

logger = logging.getLogger(__name__)


@override("fairseq.trainer.Trainer", "__init__", one_line=True)
def _train_with_shared_experts(
    original: Callable[..., None],
    trainer: Trainer,
    cfg: Any,
    task: Any,
    model: nn.Module,
    criterion: nn.Module,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Refuse what does not go with shared experts, and end the job as soon as one rank fails.

    Upstream: `Trainer.train_step` and `valid_step` go on after one rank ran out of memory, or save a checkpoint on that
    rank alone. Ranks that share experts wait for each other in every layer: what one of them does, and the others do
    not, stops them all for good. The task's steps are what the trainer calls inside of that.
    """
    shared = SharedTraining.of(cfg, model)
    if shared is not None:
        task.train_step = shared.watch_step(task.train_step)
        task.valid_step = shared.watch_step(task.valid_step)
    if isinstance(criterion, SparseCriterion):
        _keep_batch_size(cfg, criterion.update_freq_ranks)
        if criterion.monitor and cfg.distributed_training.ddp_backend == "fully_sharded":
            raise UserError(
                "--monitor-interval does not go with --ddp-backend fully_sharded, which flattens all experts into one "
                "tensor; use legacy_ddp or pytorch_ddp, or leave it out"
            )
    original(trainer, cfg, task, model, criterion, *args, **kwargs)
    monitor = monitor_of(trainer, criterion.monitor) if isinstance(criterion, SparseCriterion) else None
    trainer.hash_state = TrainerState(shared, TrainingCheckpoints(trainer), monitor)


def monitor_of(trainer: Trainer, options: "MonitorOptions | None") -> "ExpertMonitor | None":
    """Return what measures a training's experts; None if nothing does."""
    model = trainer.get_model()
    if options is None or not any(isinstance(module, SparseLayer) for module in model.modules()):
        return None  # the model is dense by name, and a line in the log has said so
    file = MonitorFile(Path(trainer.cfg.checkpoint.save_dir))
    return ExpertMonitor(model, options.interval, ExpertAlarm(options.patience, options.overload), file)


def _keep_batch_size(cfg: Any, meant_for: int) -> None:
    """Let an update have as many batches on any number of ranks.

    Upstream: `train` in fairseq_cli/train.py takes `--update-freq` as it is, so that the batch grows with the number of
    ranks, and a training that goes on with another number of ranks is another training.
    """
    ranks, update_freq = cfg.distributed_training.distributed_world_size, list(cfg.optimization.update_freq)
    if meant_for not in (0, ranks):
        scaled = scaled_update_freq(update_freq, meant_for, ranks)
        logger.info("--update-freq %s on %d ranks is %s on %d", update_freq, meant_for, scaled, ranks)
        cfg.optimization.update_freq = scaled


@override("fairseq.trainer.Trainer", "train_step")
def _end_together(original: Callable[..., Any], trainer: Trainer, samples: Any, *args: Any, **kwargs: Any) -> Any:
    """End the job on an error of the reduction or the optimizer; say which rank and which expert is not finite.

    Upstream: NaN ends a training with the names of all modules, and nobody sees which expert has it.
    """
    state = trainer.hash_state
    state.real_batches = [sample is not None and len(sample) > 0 for sample in samples]
    if state.monitor is not None:
        state.monitor.begin(trainer.get_num_updates() + 1)
    try:
        with contextlib.nullcontext() if state.shared is None else state.shared.an_update():
            return original(trainer, samples, *args, **kwargs)
    except FloatingPointError as error:
        if cause := blame(experts_not_finite(trainer.get_model())):
            raise FloatingPointError(f"{error}{cause}") from error
        raise
    finally:
        state.real_batches = []


@override("fairseq.trainer.Trainer", "_aggregate_logging_outputs")
def _leave_out_dummy_batches_only(
    original: Callable[..., Any], trainer: Trainer, logs: Any, size: Any, *others: Any, ignore: bool = False
) -> Any:
    """Count the real batches of an update whose last batch is a dummy.

    Upstream: with `--update-freq`, `Trainer.train_step` makes a dummy batch at the end of an epoch wipe out the losses
    and the number of tokens of this rank's other batches in the same update, though not their gradients. The gradients
    of all are then divided by too few tokens.
    """
    real = [log for log, is_real in zip(logs, trainer.hash_state.real_batches, strict=False) if is_real]
    if ignore and real:
        return original(trainer, real, size + sum(log["sample_size"] for log in real), *others)
    return original(trainer, logs, size, *others, ignore=ignore)


@override("fairseq.trainer.Trainer", "_reduce_and_log_stats")
def _tell_routers(
    original: Callable[..., Any], trainer: Trainer, logging_outputs: Any, sample_size: Any, grad_norm: Any = None
) -> Any:
    """Let routers that keep state, and the monitor of the experts, know what the tokens of an update chose.

    Upstream: `Trainer.train_step` calls this once after each update, with what was logged of it, summed over the ranks
    and without dummy batches; a validation has no gradient norm. No hook of fairseq's knows all of that.
    """
    if grad_norm is not None:
        update_routers(trainer.get_model(), logging_outputs)
        monitor = trainer.hash_state.monitor
        if monitor is not None and monitor.end(trainer.get_num_updates(), logging_outputs):
            for name in monitor.latest:
                metrics.log_derived(name, lambda meters, name=name: monitor.latest[name], priority=610)
    return original(trainer, logging_outputs, sample_size, grad_norm)


@override("fairseq.trainer.Trainer", "clip_grad_norm")
def _clip_with_experts(original: Callable[..., Tensor], trainer: Trainer, clip_norm: float) -> Tensor:
    """Clip by the norm of the dense gradients and those of all experts; the monitor of the experts sees them before.

    Upstream: `utils.clip_grad_norm_` leaves experts out of the norm, and scales them by it.
    """
    if trainer.hash_state.monitor is not None:
        trainer.hash_state.monitor.see_gradients(trainer.optimizer)
    shared = trainer.hash_state.shared
    if shared is None:
        return original(trainer, clip_norm)
    norm = functools.partial(shared.norm, trainer.optimizer.optimizer, trainer.is_fsdp)
    return trainer.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=norm)
