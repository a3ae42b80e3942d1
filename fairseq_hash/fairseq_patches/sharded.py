"""fairscale's fully sharded data parallel without a launcher."""

import sys
from importlib.util import find_spec
from types import ModuleType

from fairseq_hash.core.errors import UserError
from fairseq_hash.fairseq_patches.registry import one_line_errors


@one_line_errors
def _refuse(rank: int, size: int) -> None:
    """Say in one line that there is no process group."""
    raise UserError(
        "--ddp-backend fully_sharded needs a process group, and one process alone has none; start it by torchrun "
        "--standalone --nproc_per_node 1 $(which fairseq-train) ..., or use another --ddp-backend"
    )


def _ask_for_a_group() -> None:
    """Refuse `--ddp-backend fully_sharded` in one process without a process group.

    Upstream: `fsdp_enable_wrap` in fairseq/distributed/fully_sharded_data_parallel.py then takes a stand-in from
    `fairscale.utils.testing`, a module that fairscale 0.4.13 no longer has (a traceback), and with which its
    `FullyShardedDataParallel` would not start either: it makes a group of its own for its reductions.
    """
    if find_spec("fairscale") is None or find_spec("fairscale.utils") is not None:
        return
    testing = ModuleType("fairscale.utils.testing")
    testing.DummyProcessGroup = _refuse
    sys.modules["fairscale.utils"] = ModuleType("fairscale.utils")
    sys.modules["fairscale.utils.testing"] = testing


_ask_for_a_group()
