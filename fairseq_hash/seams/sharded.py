"""fairscale's fully sharded data parallel in one process."""

import sys
from importlib.util import find_spec
from types import ModuleType

from fairseq_hash.parallel import Alone


def _name_a_group_of_one() -> None:
    """Let `--ddp-backend fully_sharded` start in one process, without a launcher.

    Upstream: `fsdp_enable_wrap` in fairseq/distributed/fully_sharded_data_parallel.py takes a stand-in for a process
    group from `fairscale.utils.testing`, a module that fairscale 0.4.13 no longer has.
    """
    if find_spec("fairscale") is None or find_spec("fairscale.utils") is not None:
        return
    testing = ModuleType("fairscale.utils.testing")
    testing.DummyProcessGroup = lambda rank, size: Alone()
    sys.modules["fairscale.utils"] = ModuleType("fairscale.utils")
    sys.modules["fairscale.utils.testing"] = testing


_name_a_group_of_one()
