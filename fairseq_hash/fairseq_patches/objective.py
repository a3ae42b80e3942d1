"""What is trained for: a criterion that goes with the model."""

import logging
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from fairseq.trainer import Trainer
from torch import nn

from fairseq_hash.checkpoint.model_state import state_of
from fairseq_hash.core.errors import UserError
from fairseq_hash.fairseq_patches.registry import override
from fairseq_hash.options import option_use
from fairseq_hash.options.sparse_options import SparseOptions

logger = logging.getLogger("fairseq_hash.model")


@override("fairseq.trainer.Trainer", "__init__", one_line=True)
def _check_criterion(
    original: Callable[..., None],
    trainer: Trainer,
    cfg: Any,
    task: Any,
    model: nn.Module,
    criterion: nn.Module,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Refuse a criterion that leaves out what the model's routers need, and options of ours that cannot act.

    Upstream: `main` in fairseq_cli/train.py builds model and criterion apart, and neither sees the other before the
    first batch.
    """
    check_data_parallel(cfg.distributed_training, model)
    given = vars(cfg.criterion) if isinstance(cfg.criterion, Namespace) else cfg.criterion
    options = state_of(model).options or SparseOptions(router="none")  # a model of fairseq's is dense
    if texts := option_use.check_criterion(type(criterion), given, options):
        logger.warning(option_use.in_vain(texts))
    original(trainer, cfg, task, model, criterion, *args, **kwargs)


def check_data_parallel(config: Any, model: nn.Module) -> None:
    """Raise `UserError` where ranks would wait for gradients that an adaptive softmax has only for some batches."""
    has_clusters = getattr(getattr(model, "decoder", None), "adaptive_softmax", None) is not None
    waits = (
        config.distributed_world_size > 1
        and config.ddp_backend in ("pytorch_ddp", "c10d")
        and not config.find_unused_parameters
    )
    if has_clusters and waits:
        raise UserError(
            f"--adaptive-softmax-cutoff with --ddp-backend {config.ddp_backend} waits for gradients of words that a "
            "batch may not have; use --ddp-backend legacy_ddp, or add --find-unused-parameters"
        )
