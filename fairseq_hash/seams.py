"""Every place where fairseq's own behaviour is changed, and why. Everything else uses fairseq's public hooks."""

import atexit
import functools
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TypeVar

import fairseq
import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.distributed import LegacyDistributedDataParallel
from fairseq.distributed import utils as distributed_utils
from fairseq.models import ARCH_CONFIG_REGISTRY, distributed_fairseq_model, transformer_lm
from fairseq.trainer import Trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fairseq_hash.errors import UserError
from fairseq_hash.parallel import every_expert_on_every_rank
from fairseq_hash.training import SharedTraining

SUPPORTED_FAIRSEQ = "0.12.2"
Result = TypeVar("Result")


def require_supported_fairseq() -> None:
    """Raise `SystemExit` with one line unless this fairseq is the one the plugin was written against."""
    if fairseq.__version__.split("+")[0] != SUPPORTED_FAIRSEQ:
        raise SystemExit(
            f"fairseq_hash: fairseq {fairseq.__version__} is not supported; install fairseq {SUPPORTED_FAIRSEQ} "
            "(scripts/build_fairseq.py builds it for current Python)"
        )


@contextmanager
def language_model_decoder(decoder_class: type) -> Iterator[None]:
    """Let `TransformerLanguageModel.build_model` build `decoder_class`.

    Upstream: fairseq/models/transformer_lm.py names `TransformerDecoder` in the body of `build_model`, between forty
    lines about embeddings and positions that a subclass wants unchanged. Copying them would fork them.
    """
    original = transformer_lm.TransformerDecoder
    transformer_lm.TransformerDecoder = decoder_class
    try:
        yield
    finally:
        transformer_lm.TransformerDecoder = original


def one_line_errors(function: Callable[..., Result]) -> Callable[..., Result]:
    """Turn a `UserError` at a place that fairseq calls into an exit with its one line.

    Upstream: fairseq's commands show every exception as a traceback, `Trainer.load_checkpoint` replaces the message of
    any `Exception`, and Hydra prints its own summary of it. `SystemExit` passes through all three. Where there are
    several ranks, all of them raise the error: rank 0 prints it.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Result:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            line = f"fairseq_hash: {error}"
            if not dist.is_initialized():
                raise SystemExit(line) from error
            if dist.get_rank() == 0:
                print(line, file=sys.stderr, flush=True)
            dist.barrier()  # launchers stop all ranks when one ends: not before the line is out
            raise SystemExit(1) from error

    return call


def allow_bf16_without_tpu(args: Namespace) -> None:
    """Undo that `--bf16` (and `--memory-efficient-bf16`) switch to a TPU where no TPU library is installed.

    Upstream: `parse_args_and_arch` in fairseq/options.py sets `args.tpu` whenever `args.bf16` is set, so that bf16 on a
    GPU or CPU stops with a missing torch_xla; through Hydra it works. An architecture function runs after that line
    (and once more with the model's own options alone, which have no `bf16`).
    """
    if hasattr(args, "bf16") and args.bf16 and find_spec("torch_xla") is None:
        args.tpu = False


def set_architecture(name: str, function: Callable[[Namespace], None]) -> None:
    """Replace the architecture function of a registered model.

    Upstream: `register_model` gives every model with a dataclass an architecture of its own name that does nothing, and
    `register_model_architecture` refuses a second one.
    """
    ARCH_CONFIG_REGISTRY[name] = function


@atexit.register
def let_gloo_finish() -> None:
    """Wait a moment before Python ends, where ranks talk over gloo.

    Upstream: a thread of torch's gloo backend frees the tensors of the last exchange soon after it. Where Python is
    about to end by then, the thread aborts the process ("terminate called without an active exception"): a finished
    training would look like a failed one. Seen in 4 of 45 processes that ended right after a barrier (torch 2.13).
    """
    if dist.is_initialized() and "gloo" in dist.get_backend():
        time.sleep(0.2)


def _override(owner: Any, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Replace a method or function by the decorated one, which gets the original before all other arguments."""
    original = getattr(owner, name)

    def replace(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        setattr(owner, name, method)
        return function

    return replace


@_override(distributed_utils, "_broadcast_object_slow")
def _broadcast_any_object(
    original: Callable[..., Any], value: Any, src_rank: int, group: Any, dist_device: torch.device
) -> Any:
    """Let several ranks resume from a checkpoint.

    Upstream: rank 0 reads the file and sends what it made of it, configuration objects included, to the others. They
    read it with `torch.load`, which since torch 2.6 takes tensors and plain values only: right for files, but this is
    another process of the same job.
    """
    values = [value]
    dist.broadcast_object_list(values, src_rank, group, dist_device)
    return values[0]


@_override(LegacyDistributedDataParallel, "all_reduce_grads")
def _reduce_experts_under_legacy_ddp(original: Callable[..., None], wrapper: LegacyDistributedDataParallel) -> None:
    """Reduce the experts' gradients after the dense ones.

    Upstream: `FairseqOptimizer.all_reduce_grads` calls a method of that name where the module has one. The wrappers of
    the other backends have none and pass the call on to the model; this one skips experts and does not.
    """
    original(wrapper)
    if hasattr(wrapper.module, "all_reduce_grads") and not wrapper.accumulate_grads:
        wrapper.module.all_reduce_grads()


def _data_parallel_on_any_device(module: nn.Module, device_ids: Any, output_device: Any, **kwargs: Any) -> nn.Module:
    """Make torch's DistributedDataParallel work on a CPU.

    Upstream: fairseq/models/distributed_fairseq_model.py always passes device ids, which torch refuses for a model on
    the CPU.
    """
    if next(module.parameters()).device.type == "cpu":
        device_ids = output_device = None
    return DistributedDataParallel(module, device_ids, output_device, **kwargs)


distributed_fairseq_model.DistributedDataParallel = _data_parallel_on_any_device


@_override(Trainer, "__init__")
@one_line_errors
def _train_with_shared_experts(
    original: Callable[..., None], trainer: Trainer, cfg: Any, task: Any, model: nn.Module, *args: Any, **kwargs: Any
) -> None:
    """Refuse what does not go with shared experts, and end the job as soon as one rank fails.

    Upstream: `Trainer.train_step` and `valid_step` go on after one rank ran out of memory, or save a checkpoint on that
    rank alone. Ranks that share experts wait for each other in every layer: what one of them does, and the others do
    not, stops them all for good. The task's steps are what the trainer calls inside of that.
    """
    trainer.real_batches = []
    trainer.shared = SharedTraining.of(cfg, model)
    if trainer.shared is not None:
        task.train_step = trainer.shared.watch_step(task.train_step)
        task.valid_step = trainer.shared.watch_step(task.valid_step)
    original(trainer, cfg, task, model, *args, **kwargs)


@_override(Trainer, "train_step")
def _end_together(original: Callable[..., Any], trainer: Trainer, samples: Any, *args: Any, **kwargs: Any) -> Any:
    """End the job on an error of the reduction or the optimizer; say which rank has a loss that is not finite."""
    trainer.real_batches = [sample is not None and len(sample) > 0 for sample in samples]
    try:
        if trainer.shared is None:
            return original(trainer, samples, *args, **kwargs)
        with trainer.shared.an_update():
            return original(trainer, samples, *args, **kwargs)
    finally:
        trainer.real_batches = []


@_override(Trainer, "_aggregate_logging_outputs")
def _leave_out_dummy_batches_only(
    original: Callable[..., Any], trainer: Trainer, logs: Any, size: Any, *others: Any, ignore: bool = False
) -> Any:
    """Count the real batches of an update whose last batch is a dummy.

    Upstream: with `--update-freq`, `Trainer.train_step` makes a dummy batch at the end of an epoch wipe out the losses
    and the number of tokens of this rank's other batches in the same update, though not their gradients. The gradients
    of all are then divided by too few tokens.
    """
    real = [log for log, is_real in zip(logs, trainer.real_batches, strict=False) if is_real]
    if ignore and real:
        return original(trainer, real, size + sum(log["sample_size"] for log in real), *others)
    return original(trainer, logs, size, *others, ignore=ignore)


@_override(Trainer, "clip_grad_norm")
def _clip_with_experts(original: Callable[..., Tensor], trainer: Trainer, clip_norm: float) -> Tensor:
    """Clip by the norm of the dense gradients and those of all experts.

    Upstream: `utils.clip_grad_norm_` leaves experts out of the norm, and scales them by it.
    """
    if trainer.shared is None:
        return original(trainer, clip_norm)
    norm = functools.partial(trainer.shared.norm, trainer.optimizer.optimizer, trainer.is_fsdp)
    return trainer.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=norm)


@_override(Trainer, "_build_optimizer")
@one_line_errors
def _cut_loaded_optimizer_state(original: Callable[..., None], trainer: Trainer) -> None:
    """Give the optimizer the state of this rank's experts when it loads a checkpoint."""
    original(trainer)
    if trainer.shared is not None:
        trainer.shared.check_optimizer(trainer._optimizer)
    if trainer.shared is not None and not trainer.is_fsdp:  # which saves what each rank holds
        load = trainer._optimizer.load_state_dict
        trainer._optimizer.load_state_dict = trainer.shared.loading_own_state(trainer._optimizer.optimizer, load)


@_override(Trainer, "load_checkpoint")
@one_line_errors
def _find_every_shard(original: Callable[..., Any], trainer: Trainer, filename: str, *args: Any, **kwargs: Any) -> Any:
    """Refuse to go on from the files of some ranks.

    Upstream: where ranks save files of their own, one that finds none starts from scratch, and the others resume.
    """
    if trainer.shared is not None and trainer.is_fsdp:
        trainer.shared.check_shards(filename)
    return original(trainer, filename, *args, **kwargs)


@_override(Trainer, "consolidate_optimizer")
def _gather_optimizer_state(original: Callable[..., None], trainer: Trainer) -> None:
    """Gather the state of all experts for the checkpoint that follows."""
    original(trainer)
    if trainer.shared is not None and not trainer.is_fsdp and not trainer.cfg.checkpoint.no_save_optimizer_state:
        trainer._gathered_optim_state = trainer.shared.state_of_all(trainer.optimizer)


_always_call_state_dict = Trainer.always_call_state_dict_during_save_checkpoint
# Upstream: only rank 0 takes the model's state; gathering experts takes all ranks.
Trainer.always_call_state_dict_during_save_checkpoint = property(
    lambda trainer: trainer.shared is not None or _always_call_state_dict.fget(trainer)
)


def _evaluate_with_all_experts(load: Callable[..., Result]) -> Callable[..., Result]:
    """Load models for evaluation and generation with all experts on every rank.

    Upstream: with several ranks these commands give each rank its own batches and skip empty ones, so the ranks call
    the layers unequally often.
    """

    @functools.wraps(load)
    def call(*args: Any, **kwargs: Any) -> Result:
        with every_expert_on_every_rank():
            return load(*args, **kwargs)

    return call


checkpoint_utils.load_model_ensemble_and_task = _evaluate_with_all_experts(
    checkpoint_utils.load_model_ensemble_and_task
)
