"""Run a function on several ranks: processes that meet in a file, on the CPU over gloo, on as many GPUs over NCCL."""

import importlib
import tempfile
import time
from pathlib import Path

import forked
import torch

from fairseq_hash.fairseq_patches.data_parallel import let_gloo_finish


def start(world_size, work, arguments, folder):
    """Start one process a rank; rank r runs the function `work` ("module:name") with `arguments`."""
    torch.save(arguments, folder / "arguments.pt")  # copies: torch would share tensors between the processes
    # A file: a pipe that nobody reads while another rank is waited for would fill up and stop them both.
    return [
        forked.start(main, (world_size, work, folder, rank), folder / f"{rank}.txt", OMP_NUM_THREADS="1")
        for rank in range(world_size)
    ]


def run(world_size, work, *arguments, timeout=300):
    """Return what `work` returned on each rank; a rank's error fails the test with what the ranks said last."""
    with tempfile.TemporaryDirectory(prefix="ranks ") as name:
        folder = Path(name)
        processes = start(world_size, work, arguments, folder)
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
        codes = [process.exitcode for process in processes]  # none: no end in time
        for process in processes:
            process.kill()
            process.join()
        said = [(folder / f"{rank}.txt").read_text()[-3000:] for rank in range(world_size)]
        assert codes == [0] * world_size, "\n".join([f"exit codes {codes}", *said])
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def device():
    """Return where this process's tensors belong: each rank has a GPU of its own where there are enough."""
    is_on_gpu = torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl"
    return torch.device("cuda" if is_on_gpu else "cpu")


def main(world_size, work, folder, rank):
    """Be one rank."""
    torch.set_num_threads(1)
    on_gpus = torch.cuda.device_count() >= world_size
    if on_gpus:
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if on_gpus else "gloo", init_method=f"file://{folder}/meeting", world_size=world_size, rank=rank
    )
    module, name = work.split(":")
    arguments = torch.load(folder / "arguments.pt", weights_only=True)
    result = getattr(importlib.import_module(module), name)(*arguments)
    torch.save(result, folder / f"{rank}.pt")
    torch.distributed.barrier()
    let_gloo_finish()
    torch.distributed.destroy_process_group()
