"""Run a function on several ranks: processes that meet in a file, on the CPU over gloo, on as many GPUs over NCCL."""

import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fairseq_hash import seams

TESTS = Path(__file__).parent


def start(world_size, work, arguments, folder):
    """Start one process a rank; rank r runs the function `work` ("module:name") with `arguments`."""
    torch.save(arguments, folder / "arguments.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, str(TESTS / "ranks.py"), str(world_size), work, str(folder)]
    processes = []
    for rank in range(world_size):
        # A file: a pipe that nobody reads while another rank is waited for would fill up and stop them both.
        with open(folder / f"{rank}.txt", "w") as said:
            processes.append(subprocess.Popen([*command, str(rank)], stdout=said, stderr=said, env=environment))
    return processes


def run(world_size, work, *arguments, timeout=300):
    """Return what `work` returned on each rank; a rank's error fails the test with what the ranks said last."""
    with tempfile.TemporaryDirectory(prefix="ranks ") as name:
        folder = Path(name)
        processes = start(world_size, work, arguments, folder)
        deadline = time.monotonic() + timeout
        try:
            codes = [process.wait(max(deadline - time.monotonic(), 0)) for process in processes]
        except subprocess.TimeoutExpired:
            codes = ["no end in time"]
        finally:
            for process in processes:
                process.kill()
        said = [(folder / f"{rank}.txt").read_text()[-3000:] for rank in range(world_size)]
        assert not any(codes), "\n".join([f"exit codes {codes}", *said])
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def device():
    """Return where this process's tensors belong: each rank has a GPU of its own where there are enough."""
    is_on_gpu = torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl"
    return torch.device("cuda" if is_on_gpu else "cpu")


def main(world_size, work, folder, rank):
    """Be one rank."""
    torch.set_num_threads(1)
    on_gpus = torch.cuda.device_count() >= int(world_size)
    if on_gpus:
        torch.cuda.set_device(int(rank))
    torch.distributed.init_process_group(
        "nccl" if on_gpus else "gloo",
        init_method=f"file://{folder}/meeting",
        world_size=int(world_size),
        rank=int(rank),
    )
    module, name = work.split(":")
    arguments = torch.load(Path(folder) / "arguments.pt", weights_only=True)
    result = getattr(importlib.import_module(module), name)(*arguments)
    torch.save(result, Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    seams.let_gloo_finish()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
