"""Trainings of several processes without a launcher, one of which fails, and what they say."""

import re
import socket
import time
from pathlib import Path

import forked
from hydra_configs import write_configs
from plugin import train_arguments

LIMIT = 120
FAILURES = str(Path(__file__).parent / "failures.py")
SHARED = (
    *("--router", "hash", "--sparse-layers", "1", "--num-experts", "6", "--max-tokens", "64", "--no-save"),
    *("--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp"),
)


def start(words, folder, **environment):
    """Start `python WORDS` in a folder of its own, which also takes what it says."""
    folder.mkdir(exist_ok=True)
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return forked.start_python(words, folder / "out", folder / "err", folder, **environment)


def finish(processes, folders, has_stopped=None):
    """Wait for all processes but the one that has stopped, and return what each said on stderr."""
    deadline = time.monotonic() + LIMIT
    try:
        for rank, process in enumerate(processes):
            if rank != has_stopped:
                process.join(max(0.1, deadline - time.monotonic()))
                assert process.exitcode not in (None, 0)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [(folder / "err").read_text() for folder in folders]


def free_port():
    """Return a port that nobody uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_hydra_ranks(tmp_path, data, failure):
    """Run a training of two ranks by Hydra to its failure; return what each rank said on stderr.

    `failure` is (how, rank) of failures.py.
    """
    chosen = (*write_configs(tmp_path, data, updates=20), "cluster=cpu", f"hydra.run.dir='{tmp_path / 'the run'}'")
    folders = [tmp_path / f"rank {rank}" for rank in range(2)]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        start([FAILURES, *failure, *chosen], folder, **meeting, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, folder in enumerate(folders)
    ]
    return finish(processes, folders)


def run_ranks(tmp_path, corpora, *arguments, failure=None):
    """Run a training to its failure, a process for each of the corpora; return what each rank said on stderr.

    There is no launcher: rank 0 keeps the store. `failure` is (how, rank) of failures.py.
    """
    folders = [tmp_path / f"rank {rank}" for rank in range(len(corpora))]
    meeting = f"tcp://127.0.0.1:{free_port()}"
    common = (*SHARED, "--distributed-world-size", len(corpora), "--distributed-init-method", meeting, *arguments)
    command = (FAILURES, *failure) if failure else ("-m", "fairseq_cli.train")
    processes = []
    for rank, (folder, corpus) in enumerate(zip(folders, corpora, strict=True)):
        own = ("--distributed-rank", rank, "--distributed-no-spawn")
        processes.append(start([*command, *train_arguments(corpus, tmp_path / "saved", *common, *own)], folder))
    return finish(processes, folders, failure[1] if failure and failure[0] == "silent" else None)


def messages(said):
    """Return (rank, message) of every line that is ours."""
    return [(rank, line) for rank, err in enumerate(said) for line in re.findall(r"^fairseq_hash: (.*)$", err, re.M)]


def assert_one_line(said, pattern):
    """Check that rank 0 said this, and no rank anything else of its own."""
    [(rank, message)] = messages(said)
    assert rank == 0 and re.fullmatch(pattern, message), message
    assert "Traceback" not in "".join(said)
