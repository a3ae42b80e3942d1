"""fairscale's fully sharded data parallel without a launcher."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from fairseq_hash.core.errors import UserError
from fairseq_hash.fairseq_patches.registry import override


@override("fairseq_cli.train", "add_defaults", one_line=True)
def _ask_for_a_group(original: Callable[..., None], cfg: Any) -> None:
    """Refuse `--ddp-backend fully_sharded` in one process without a process group.

    Upstream: `fsdp_enable_wrap` in fairseq/distributed/fully_sharded_data_parallel.py then takes a stand-in from
    `fairscale.utils.testing`, a module that fairscale 0.4.13 no longer has (a traceback), and with which its
    `FullyShardedDataParallel` would not start either: it makes a group of its own for its reductions.
    """
    original(cfg)
    if cfg.distributed_training.ddp_backend == "fully_sharded" and not dist.is_initialized():
        raise UserError(
            "--ddp-backend fully_sharded needs a process group, and one process alone has none; start it by torchrun "
            "--standalone --nproc_per_node 1 $(which fairseq-train) ..., or use another --ddp-backend"
        )
