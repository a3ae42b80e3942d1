"""Several processes on CPUs, as torchrun starts them: without a word about gloo."""

import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
from fairseq.distributed import utils as distributed_utils
from plugin import losses, on_ranks, train, train_arguments

from fairseq_hash.fairseq_patches import cpu

SPARSE = ("--router", "hash", "--num-experts", "4", "--sparse-layers", "0,1", "--disable-validation")
TORCHRUN = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "0"}


@pytest.mark.parametrize("is_asked_for", [True, False], ids=["--cpu", "no GPU"])
def test_two_processes_train_as_one(data, tmp_path, is_asked_for):
    given = train_arguments(data, tmp_path / "two", *SPARSE)
    if not is_asked_for:
        given.remove("--cpu")
    two = on_ranks(2, "-m", "fairseq_cli.train", *given)
    said = "".join(rank.stdout + rank.stderr for rank in two)
    assert [rank.returncode for rank in two] == [0, 0], said[-3000:]
    why = "--cpu" if is_asked_for else "torch sees no GPU"
    assert re.findall(r"fairseq_patches\.cpu \| (.*)", said) == [
        f"{why}: the processes run on CPUs, and talk over gloo in place of nccl"
    ]
    one = train(data, tmp_path / "one", *SPARSE, "--update-freq", "2")
    assert losses(two[0]) == pytest.approx(losses(one), abs=2e-3)  # they are logged in thousandths
    assert len(losses(two[0])) == 8


def options(**changed):
    """Return fairseq's `distributed_training` options as a command has them."""
    usual = {"distributed_init_method": None, "distributed_port": -1, "distributed_world_size": 1}
    return SimpleNamespace(**{**usual, "distributed_backend": "nccl", "distributed_rank": 0, **changed})


@pytest.mark.parametrize(
    ("given", "environment", "backend"),
    [
        ({}, {}, "nccl"),  # one process needs none
        ({}, TORCHRUN, "gloo"),
        ({"distributed_backend": "mpi"}, TORCHRUN, "mpi"),
        ({"distributed_init_method": "tcp://localhost:1", "distributed_world_size": 2}, {}, "gloo"),
        ({"distributed_port": 29500, "distributed_world_size": 2}, {}, "gloo"),
    ],
    ids=["alone", "torchrun", "another", "address", "port"],
)
def test_who_talks_over_gloo(monkeypatch, given, environment, backend):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cfg = options(**given)
    cpu.meet_over_gloo(cfg, is_asked_for=True)
    assert cfg.distributed_backend == backend
    assert cfg.distributed_world_size == given.get("distributed_world_size", 1)


def test_processes_that_nothing_starts(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    cfg = options(distributed_world_size=8)  # fairseq's default where there are GPUs
    cpu.meet_over_gloo(cfg, is_asked_for=True)
    assert cfg.distributed_world_size == 1
    with pytest.raises(SystemExit, match=r"--distributed-world-size 3: nothing .*torchrun --nproc_per_node 3 "):
        cpu.meet_over_gloo(options(distributed_world_size=3), is_asked_for=True)


@pytest.mark.parametrize(
    ("tasks", "world_size", "line"),
    [
        (4, 4, None),
        (4, 3, "--distributed-world-size 3 is not the number of tasks of this job; start one task for each process"),
        (2, 2, "the nodes have no GPUs, and one task each; start one task for each process"),
    ],
)
def test_tasks_of_slurm(monkeypatch, tasks, world_size, line):
    """Two nodes, by fairseq's own rendezvous: `srun ... --distributed-port N`."""
    job = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_NTASKS": str(tasks), "SLURM_NODEID": "1"}
    for name, value in {**job, "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    monkeypatch.setattr(subprocess, "check_output", lambda words: b"n1\nn2\n")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    cfg = options(distributed_port=29500, distributed_world_size=world_size, pipeline_model_parallel=False)
    if line is None:
        distributed_utils._infer_slurm_init(cfg, None)
        assert (cfg.distributed_init_method, cfg.distributed_rank) == ("tcp://n1:29500", 3)
        return
    with pytest.raises(SystemExit, match=line):
        distributed_utils._infer_slurm_init(cfg, None)
