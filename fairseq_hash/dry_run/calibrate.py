"""Measures this CPU for a dry run: the rates that matrix products, memory and exchanges between processes reach."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from fairseq.trainer import Trainer

import fairseq_hash
from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import check_out, output_file
from fairseq_hash.core.memory import machine_bytes
from fairseq_hash.dry_run.hardware import GPUS, Hardware, as_yaml
from fairseq_hash.dry_run.roofline import CALLS, Roofline
from fairseq_hash.dry_run.update import batches_of, silence
from fairseq_hash.experiments.compose import compose
from fairseq_hash.experiments.names import own_configs
from fairseq_hash.experiments.sizes import made_task
from fairseq_hash.provenance import provenance

ROUNDS, WARM_UP = 40, 5
VOCABULARY = 20
TINY = ["model.decoder_embed_dim=8", "model.decoder_ffn_embed_dim=8", "dataset.max_tokens=64"]
ROWS, WIDTH, HIDDEN = 1024, 256, 1024  # of a product like those of a small feed-forward network
CACHE = 2**22  # bytes of one operation that its next one finds in a core's cache
EXCHANGED = 2**22  # bytes
DTYPES = (torch.float32, torch.bfloat16)


def calibrate(path: Path) -> None:
    """Measure this CPU on the threads that torch has now, and write the file.

    Raises:
        UserError: if the file is there, or cannot be written.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"--calibrate {path}: give a name that ends in .yaml")
    check_out(path, overwrite=False)
    found = measure()
    with output_file(path) as partial:
        partial.write_text(as_yaml(found), encoding="utf-8")
    print(f"wrote {path}: {found.source}")


def measure() -> Hardware:
    """Return what this CPU reaches, medians of several rounds, on a machine that should do nothing else."""
    origin = provenance()
    rates = {str(dtype).removeprefix("torch."): _products(dtype) for dtype in DTYPES}
    wire, latency = _wire()
    threads = torch.get_num_threads()
    source = f"measured on {origin['processor']}, {threads} thread{'s'[: threads > 1]}, {origin['date']}"
    return Hardware(
        name=f"CPU ({origin['processor']})",
        source=source,
        memory=machine_bytes(),
        flops=rates,
        bandwidth=_bandwidth(4 * CACHE),
        call=_call(),
        wire_inside=wire,
        wire_between=wire,
        latency=latency,
        cache=float(CACHE),
        cached_bandwidth=_bandwidth(CACHE // 8),
        devices_per_node=os.cpu_count() or 1,
        is_gpu=False,
    )


def _seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Return the median time of one call; the first rounds only warm up."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times[WARM_UP:])


def _products(dtype: torch.dtype) -> float:
    """Return 10^12 FLOPs a second of matrix products."""
    rows, weight = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(WIDTH, HIDDEN).to(dtype)
    return 2 * ROWS * WIDTH * HIDDEN / _seconds(lambda: rows @ weight) / 1e12


def _bandwidth(size: int) -> float:
    """Return 10^9 bytes a second of an operation that reads two tensors of so many bytes, and makes one."""
    one, other = torch.randn(size // 4), torch.randn(size // 4)
    return 3 * size / _seconds(lambda: one + other) / 1e9


def _call() -> float:
    """Return microseconds of an operation beside its work: of an update of a model so small that it has hardly any.

    So they hold what Python, autograd and fairseq's trainer take for an operation.
    """
    fairseq_hash.register()
    experiment = compose(own_configs(), "laptop/dense", TINY)
    config = experiment.config
    config.common.cpu = True
    with silence():
        task = made_task(config, VOCABULARY)
        trainer = Trainer(config, task, task.build_model(config.model), task.build_criterion(config.criterion))
        batches = batches_of(config).made()
        seconds = _seconds(lambda: trainer.train_step(batches))
        with Roofline(replace(GPUS["h100"], call=1.0)) as counted:
            trainer.train_step(batches)
    return seconds / counted.seconds[CALLS]


def _wire() -> tuple[float, float]:
    """Return 10^9 bytes a second that one of two processes sends, and microseconds of a small exchange."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_exchange, (folder,), nprocs=2)
        large, small = torch.load(Path(folder, "seconds.pt"), weights_only=True).tolist()
    return EXCHANGED / 2 / max(large - small, 1e-9) / 1e9, small * 1e6


def _exchange(rank: int, folder: str) -> None:
    """Be one of two processes that exchange half of a tensor."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", world_size=2, rank=rank)
    times = []
    for size in (EXCHANGED, 64):
        given = torch.zeros(size // 4)
        taken = torch.empty_like(given)
        times.append(_seconds(lambda given=given, taken=taken: dist.all_to_all_single(taken, given)))  # type: ignore[misc]
    if rank == 0:
        torch.save(torch.tensor(times), Path(folder, "seconds.pt"))
    dist.barrier()
    dist.destroy_process_group()
