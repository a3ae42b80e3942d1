"""Several processes on CPUs."""

import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from fairseq_hash.core.errors import UserError
from fairseq_hash.fairseq_patches.registry import override
from fairseq_hash.parallel.collectives import one_line_errors

logger = logging.getLogger(__name__)

LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")  # what torchrun sets, and fairseq looks for


@override("fairseq.distributed.utils", "call_main")
def _let_cpus_meet(original: Callable[..., None], cfg: Any, main: Callable[..., None], **kwargs: Any) -> None:
    """Let processes on CPUs talk over gloo.

    Upstream: they use NCCL unless told otherwise, which needs GPUs (a long traceback from every process).
    """
    if not cfg.common.tpu and (cfg.common.cpu or not torch.cuda.is_available()):
        meet_over_gloo(cfg.distributed_training, cfg.common.cpu)
    original(cfg, main, **kwargs)


@one_line_errors
def meet_over_gloo(cfg: Any, is_asked_for: bool) -> None:
    """Choose what several processes on CPUs need; leave one process alone.

    `cfg` has fairseq's `distributed_training` options, which are changed. `is_asked_for`: whether `--cpu` was given;
    otherwise there is no GPU.

    Raises:
        UserError: where several processes are asked for, and nothing starts them.
    """
    is_launched = cfg.distributed_init_method is not None or all(name in os.environ for name in LAUNCHED)
    if not is_launched and cfg.distributed_port <= 0:  # the port is for SLURM
        if cfg.distributed_world_size not in (1, torch.cuda.device_count()):
            raise UserError(
                f"--distributed-world-size {cfg.distributed_world_size}: nothing starts so many processes on a CPU; "
                f"use torchrun --nproc_per_node {cfg.distributed_world_size} $(which fairseq-train) ... --cpu"
            )
        cfg.distributed_world_size = 1  # not the number of GPUs, fairseq's default
        return
    if cfg.distributed_backend == "nccl":
        cfg.distributed_backend = "gloo"
        if os.environ.get("RANK", str(cfg.distributed_rank)) == "0":
            why = "--cpu" if is_asked_for else "torch sees no GPU"
            logger.info("%s: the processes run on CPUs, and talk over gloo in place of nccl", why)


@override("fairseq.distributed.utils", "_infer_slurm_init", one_line=True)
def _count_tasks(original: Callable[..., None], cfg: Any, *args: Any) -> None:
    """Say in one line that the tasks of a SLURM job are not the processes that the options mean.

    Upstream: an assertion without words; and one task on each node is a process for each of its GPUs, so that without
    GPUs there are 0.
    """
    remedy = "start one task for each process, and give their number: srun --ntasks N ... --distributed-world-size N"
    given = cfg.distributed_world_size
    try:
        original(cfg, *args)
    except AssertionError:
        raise UserError(f"--distributed-world-size {given} is not the number of tasks of this job; {remedy}") from None
    if cfg.distributed_world_size == 0:
        raise UserError(f"the nodes have no GPUs, and one task each; {remedy} (at least two a node)")
