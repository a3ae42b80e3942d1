"""Saving and loading checkpoints."""

import argparse
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer
from omegaconf.errors import OmegaConfBaseException

from fairseq_hash.checkpoint.loading import loading_weights_only, read_checkpoint
from fairseq_hash.checkpoint.mainfile import duplicate, not_here, write_main
from fairseq_hash.core.errors import UserError
from fairseq_hash.fairseq_patches.averaging import go_on_averaging
from fairseq_hash.fairseq_patches.registry import override, replaced, replacement
from fairseq_hash.parallel.collectives import gather, run_on_all_ranks


@override("fairseq.checkpoint_utils", "load_checkpoint", one_line=True)
def _start_knowingly(original: Callable[..., Any], cfg: Any, trainer: Trainer, **kwargs: Any) -> Any:
    """Keep other trainings out of the folder, clean it, and refuse to start anew where there are checkpoints.

    Upstream: where the file to go on from does not exist, training starts from scratch, whatever else is there.
    """
    trainer.hash_state.checkpoints.begin(cfg)
    return original(cfg, trainer, **kwargs)


@override("fairseq.trainer.Trainer", "load_checkpoint", one_line=True)
def _load_on_every_rank(
    original: Callable[..., Any], trainer: Trainer, filename: str, reset_optimizer: bool = False, *args: Any, **kw: Any
) -> Any:
    """Let every rank read the file, which for experts is to read its own; go on at another number of ranks.

    Upstream: rank 0 reads all and sends all to all. The place in the epoch is counted for one number of ranks, and
    another number stops with "dataloader mismatch" or skips text.
    """
    trainer.hash_state.checkpoints.check_file(filename, with_optimizer=not reset_optimizer)
    averages = trainer.cfg.ema.store_ema
    with (
        replaced(trainer.cfg.checkpoint, "load_checkpoint_on_all_dp_ranks", True),
        replaced(trainer.cfg.ema, "store_ema", False),
        loading_weights_only(is_needed=reset_optimizer),
    ):
        try:
            extra_state = original(trainer, filename, reset_optimizer, *args, **kw)
        except UserError as error:
            raise UserError(f"{filename}: {error}") from error
    if averages and extra_state is not None:
        go_on_averaging(trainer, extra_state)
    return trainer.hash_state.checkpoints.loaded(filename, extra_state)


class _TorchThatHasLoaded:
    """torch for fairseq's module of checkpoints alone, where `load` returns what has been read already."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.load = lambda *_, **__: state

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@override("fairseq.checkpoint_utils", "load_checkpoint_to_cpu", one_line=True)
def _read_without_running_code(
    original: Callable[..., Any], path: str, arg_overrides: Any = None, load_on_all_ranks: bool = False
) -> Any:
    """Read what is in memory-mapped files, checked and without code, and open the shards of the experts.

    Upstream: `torch.load` of a file object, which cannot be mapped; a damaged tensor is not noticed.
    """
    # Once is enough for a file that all ranks read.
    is_checked = not load_on_all_ranks or gather(path).index(path) == (dist.get_rank() if dist.is_initialized() else 0)
    read = functools.partial(read_checkpoint, path, is_checked=is_checked)
    state = run_on_all_ranks(read) if load_on_all_ranks else read()
    with replaced(checkpoint_utils, "torch", _TorchThatHasLoaded(state)):
        try:
            return original(path, arg_overrides, load_on_all_ranks)
        except (TypeError, AttributeError, ValueError, LookupError, OmegaConfBaseException) as error:
            if isinstance(error, UserError):
                raise
            if type(error) is KeyError:
                raise UserError(f"{path} is not a checkpoint of fairseq-train: it lacks {error}") from error
            # Upstream turns the options of older versions into those of this one, and takes them for what it wrote.
            words = " ".join(str(error).split())
            raise UserError(
                f"{path} has options that fairseq cannot read ({type(error).__name__}: {words}); use another checkpoint"
            ) from error


@override("fairseq.checkpoint_utils", "load_model_ensemble_and_task", one_line=True)
def _load_weights_only(original: Callable[..., Any], filenames: list[str], *args: Any, **kwargs: Any) -> Any:
    """Load models for evaluation and generation without the optimizer's state; name a file that does not exist.

    Upstream: such a file is a traceback.
    """
    with loading_weights_only():
        try:
            return original(filenames, *args, **kwargs)
        except OSError as error:
            missing = str(error).removeprefix("Model file not found: ")
            if missing == str(error):
                raise
            raise UserError(f"--path {not_here(missing)}") from error


@override("fairseq.options", "parse_args_and_arch", one_line=True)
def _require_path(
    original: Callable[..., Any],
    parser: argparse.ArgumentParser,
    input_args: "list[str] | None" = None,
    *args: Any,
    **kw: Any,
) -> Any:
    """Say in one line that a command which evaluates or generates was given no model.

    Upstream: an assertion, or an error about `None`, each in a traceback.
    """
    parsed = original(parser, input_args, *args, **kw)
    if input_args is None and getattr(parsed, "path", "") is None:  # a training has no such option
        raise UserError("--path is missing; give the checkpoint, such as --path runs/hash/checkpoint_best.pt")
    return parsed


@override("fairseq.trainer.Trainer", "_build_optimizer", one_line=True)
def _load_own_optimizer_state(original: Callable[..., None], trainer: Trainer) -> None:
    """Give the optimizer the state of this rank's experts when it loads a checkpoint."""
    original(trainer)
    if trainer.hash_state.shared is not None:
        trainer.hash_state.shared.check_optimizer(trainer._optimizer)
    if not trainer.is_fsdp:  # which saves what each rank holds
        trainer._optimizer.load_state_dict = trainer.hash_state.checkpoints.loading_own_state(trainer._optimizer)


@override("fairseq.checkpoint_utils", "save_checkpoint", one_line=True)
def _save_together(
    original: Callable[..., None], cfg: Any, trainer: Trainer, epoch_itr: Any, val_loss: "float | None"
) -> None:
    """Let every rank write its experts when rank 0 decides to save, and end all ranks when one cannot.

    Upstream: only rank 0 writes, and the others go on.
    """
    trainer.hash_state.checkpoints.save(
        functools.partial(original, cfg, trainer, epoch_itr, val_loss), Path(cfg.save_dir)
    )


@override("fairseq.trainer.Trainer", "save_checkpoint")
def _write_experts_first(
    original: Callable[..., None], trainer: Trainer, filename: str, extra_state: dict[str, Any]
) -> None:
    """Write the experts to shards before the main file, and note the number of ranks with the place in the epoch."""
    if trainer.hash_state.checkpoints.before_main(Path(filename), extra_state):
        original(trainer, filename, extra_state)


@override("fairseq.trainer.Trainer", "state_dict")
def _put_manifest(original: Callable[..., dict[str, Any]], trainer: Trainer) -> dict[str, Any]:
    """Leave the experts, which are in shards, out of the main file."""
    return trainer.hash_state.checkpoints.main_state(original(trainer))


@override("fairseq.checkpoint_utils", "torch_persistent_save")
def _write_whole(original: Callable[..., None], state: Any, filename: str, async_write: bool = False) -> None:
    """Write a file that is whole and on disc before it has its name.

    Upstream: a write that fails is tried again behind what the first has left, and the pieces stay. And
    `checkpoint_last.pt` is the last of a save's names, so that a kill in the first save may leave another name alone,
    from which no training goes on. Here the first save begins with it.
    """
    if async_write or not PathManager.supports_rename(filename):
        return original(state, filename, async_write)
    path = Path(filename)
    last = path.with_name("checkpoint_last.pt")
    if path == last or last.exists() or not _has_last(state, path):
        return write_main(state, filename)
    write_main(state, str(last))
    return duplicate(str(last), filename)


def _has_last(state: Any, path: Path) -> bool:
    """Return whether a file is one of the names of a save that `checkpoint_last.pt` is another one of."""
    config = state.get("cfg") if isinstance(state, dict) else None
    saving = config.get("checkpoint") if isinstance(config, dict) else None
    if not isinstance(saving, dict) or saving.get("no_last_checkpoints", True):
        return False
    is_whole = re.fullmatch(r"checkpoint(\d+|_\d+_\d+|_best|\.best_.*)\.pt", path.name)  # not one of several shards
    return is_whole is not None and path.parent == Path(saving["save_dir"])


@replacement("fairseq.checkpoint_utils", "PathManager")
def _copy_whole(original: type[PathManager]) -> type[PathManager]:
    """Let the copies of a checkpoint be whole at any time.

    Upstream: `checkpoint_last.pt` and others are written over in place, so that a kill leaves half of one.
    """
    return _WholeCopies


class _WholeCopies(PathManager):
    """fairseq's `PathManager`, for `checkpoint_utils` alone."""

    @staticmethod
    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        """Copy, or link, one checkpoint to another name."""
        if PathManager.path_requires_pathmanager(dst_path):
            return PathManager.copy(src_path, dst_path, overwrite=overwrite)
        duplicate(src_path, dst_path)
        return True
