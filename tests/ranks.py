"""Run a function on several ranks: processes on the CPU that talk over gloo and meet in a file."""

import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

TESTS = Path(__file__).parent


def start(world_size, work, arguments, folder):
    """Start one process a rank; rank r runs the function `work` ("module:name") with `arguments`."""
    torch.save(arguments, folder / "arguments.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, str(TESTS / "ranks.py"), str(world_size), work, str(folder)]
    return [
        subprocess.Popen(
            [*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(world_size)
    ]


def run(world_size, work, *arguments):
    """Return what `work` returned on each rank; a rank's error fails the test with all that the ranks said."""
    with tempfile.TemporaryDirectory(prefix="ranks ") as name:
        folder = Path(name)
        processes = start(world_size, work, arguments, folder)
        said = [finish(process) for process in processes]
        assert not any(process.returncode for process in processes), "\n".join(err[-3000:] for _, err in said)
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def finish(process, timeout=300):
    """Wait for a process and return what it said."""
    try:
        return process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        return out, err + "\nkilled: it did not end in time\n"


def main(world_size, work, folder, rank):
    """Be one rank."""
    torch.set_num_threads(1)
    backend = "gloo"
    torch.distributed.init_process_group(
        backend, init_method=f"file://{folder}/meeting", world_size=int(world_size), rank=int(rank)
    )
    module, name = work.split(":")
    arguments = torch.load(Path(folder) / "arguments.pt", weights_only=True)
    result = getattr(importlib.import_module(module), name)(*arguments)
    torch.save(result, Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
