"""Files and folders that the options of a training name: looked at first, by all ranks."""

from collections.abc import Callable
from typing import Any

from fairseq.distributed import utils as distributed_utils

from fairseq_hash.checkpoint.mainfile import is_url, not_here
from fairseq_hash.core.errors import UserError
from fairseq_hash.core.places import require_file, require_folder
from fairseq_hash.fairseq_patches.registry import override
from fairseq_hash.parallel.collectives import run_on_all_ranks


@override("fairseq_cli.train", "add_defaults", one_line=True)
def _check_places(original: Callable[..., None], cfg: Any) -> None:
    """Check what the training reads and writes before anything is built.

    Upstream: `main` in fairseq_cli/train.py completes the configuration here, on every rank, after it has imported the
    plugin. Then rank 0 alone looks at `--save-dir` (a traceback, and the others wait for it); a log or TensorBoard's
    folder that cannot be written ends the training later.
    """
    original(cfg)
    run_on_all_ranks(lambda: check_places(cfg, is_first=distributed_utils.get_global_rank() == 0))


def check_places(cfg: Any, is_first: bool) -> None:
    """Raise `UserError` where an option of a training cannot be followed.

    `is_first`: whether this is the rank that writes checkpoints and TensorBoard's files.
    """
    if cfg.dataset.max_tokens is None and cfg.dataset.batch_size is None:
        raise UserError("how large a batch is has to be given: --max-tokens N, or --batch-size N")
    saving = cfg.checkpoint
    if is_url(saving.save_dir):
        raise UserError(f"--save-dir {saving.save_dir} is no folder of this machine; give one, and copy it afterwards")
    for option, path in (
        ("--restore-file", saving.restore_file),
        ("--finetune-from-model", saving.finetune_from_model),
        ("--continue-once", saving.continue_once),
        ("--from-dense", getattr(cfg.model, "from_dense", None)),
    ):
        if path and is_url(path):
            raise UserError(f"{option} {not_here(path)}")
    if is_first:
        require_folder("--save-dir", saving.save_dir)
        if cfg.common.tensorboard_logdir:
            require_folder("--tensorboard-logdir", cfg.common.tensorboard_logdir)
    if cfg.common.log_file:
        require_file("--log-file", cfg.common.log_file)
