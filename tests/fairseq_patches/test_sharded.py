"""`--ddp-backend fully_sharded` without a launcher ends in one line, before a model is built."""

from types import SimpleNamespace

import pytest
import torch.distributed as dist
from fairseq_cli import train as fairseq_train

import fairseq_hash
from fairseq_hash.fairseq_patches import sharded

fairseq_hash.register()


def configuration(backend):
    return SimpleNamespace(distributed_training=SimpleNamespace(ddp_backend=backend))


def test_it_needs_a_process_group(monkeypatch):
    done = []
    with pytest.raises(SystemExit, match="fairseq_hash: --ddp-backend fully_sharded needs a process group, and one"):
        sharded._ask_for_a_group(done.append, configuration("fully_sharded"))
    sharded._ask_for_a_group(done.append, configuration("legacy_ddp"))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    sharded._ask_for_a_group(done.append, configuration("fully_sharded"))
    assert len(done) == 3  # fairseq's own defaults come first


def test_the_training_asks():
    assert fairseq_train.add_defaults.__wrapped__.__wrapped__.__module__ == "fairseq.dataclass.initialize"
