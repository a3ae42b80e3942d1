#!/usr/bin/env python3
"""Checkpoints: experts in shards compared with fairseq's one file per rank, on the CPU, one single-threaded process per
rank.

    python benchmarks/checkpoints.py [--experts-gb GB] [--processes P] [--repeats N] [--folder FOLDER] [--out FILE]

P ranks share the experts of one sparse layer, which is trained for one update, so that Adam has both its moments. In
every round each of two ways saves that training to an empty folder and loads it into a new trainer; the two take turns
at being first. A call is timed from barrier to barrier. The loaded state must equal the saved one.

- ours: `checkpoint_utils.save_checkpoint`, which writes `checkpoint_best.pt` and `checkpoint_last.pt` (one file with
  two names) and the experts in shards; `Trainer.load_checkpoint` of `checkpoint_last.pt`.
- fairseq: what fairseq does for its BASE layers, with its own functions: every rank saves everything that it holds,
  dense part included, as `checkpoint_best-rank-N.pt` and copies that to `checkpoint_last-rank-N.pt`; every rank reads
  its own file with `torch.load` and gives it to model and optimizer.

Columns are medians (smallest to largest) of all rounds; the last row has the ratios within a round:

- `save s`: the save as each does it. Ours has everything on disk at the end (fsync); fairseq does not wait for the
  disk.
- `on disc s`: the same with an fsync of each file; for fairseq it is done here, right after its save.
- `MB` (10^6 bytes): the sizes of the folder's files; a file with several names counts once. `copies`: this size divided
  by the size of all parameters and moments, each counted once.
- `load s`: into an existing model, from the system's page cache, not from the disk. Ours checks all checksums.
- `peak`: the peak of anonymous memory (RssAnon) during the load, minus that before the trainer was made, divided by the
  size of the parameters and moments that the rank holds afterwards; the largest of all ranks. In small models the rest
  of a trainer (tens of MB) matters, too.
"""

import argparse
import ctypes
import gc
import inspect
import json
import logging
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fairseq_hash

fairseq_hash.register()  # before fairseq is imported, to suppress its messages

# ruff: noqa: E402
import torch
import torch.distributed as dist
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.data import iterators
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.file_io import PathManager
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from rich.console import Console

from fairseq_hash.checkpoint.expert_state import is_per_element
from fairseq_hash.cli import Parser
from fairseq_hash.core.progress import Display
from fairseq_hash.fairseq_patches.data_parallel import let_gloo_finish
from fairseq_hash.parallel.groups import expert_names
from fairseq_hash.provenance import listed, provenance

INTERVAL = 0.003  # seconds between two readings of the memory
COLUMNS = ("save s", "on disc s", "MB", "copies", "load s", "peak")
Record = dict[str, float]  # by column


def anonymous_memory() -> int:
    """Return the bytes of this process's memory that belong to no file."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if "RssAnon" in line) * 1024


def free_unused_memory() -> None:
    """Give all free memory back to the system: otherwise it would count as held before, and could be reused unseen."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Yield a list to which this process's anonymous memory is appended every few milliseconds."""
    seen, is_over = [anonymous_memory()], threading.Event()

    def watch() -> None:
        while not is_over.wait(INTERVAL):
            seen.append(anonymous_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()
        seen.append(anonymous_memory())


def over_ranks(value: float, how: dist.ReduceOp) -> float:
    """Return the sum or maximum over all ranks."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op=how)
    return tensor.item()


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of a call, from the common start of all ranks to the end of the last one."""
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def make_trainer(arguments: argparse.Namespace, folder: Path) -> Trainer:
    """Return this rank's fairseq trainer, as `fairseq-train` makes it."""
    given = [str(folder / "bin"), "--task", "language_modeling", "--user-dir", str(Path(fairseq_hash.__file__).parent)]
    given += f"--arch hash_transformer_lm_tiny --decoder-layers 1 --decoder-embed-dim {arguments.width}".split()
    given += f"--decoder-ffn-embed-dim {arguments.hidden} --decoder-attention-heads 4 --criterion hash_moe".split()
    given += f"--router hash --sparse-layers 0 --num-experts {arguments.experts} --tokens-per-sample 16".split()
    given += f"--expert-parallel-size {arguments.processes} --max-tokens 64 --optimizer adam --lr 1e-3 --cpu".split()
    given += f"--distributed-world-size {dist.get_world_size()} --distributed-rank {dist.get_rank()}".split()
    given += "--ddp-backend legacy_ddp --num-workers 0 --seed 1 --no-epoch-checkpoints".split()
    given += ["--save-dir", str(folder / "ours")]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), given))
    utils.set_torch_seed(1)
    task = tasks.setup_task(cfg.task)
    return Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))


def state_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return the parameters and moments that a rank holds, by name."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in trainer.get_model().named_parameters():
        tensors[name] = parameter.detach()
        moments = trainer.optimizer.optimizer.state[parameter]
        tensors |= {f"{name}/{key}": value for key, value in moments.items() if is_per_element(value, parameter.shape)}
    return tensors


def size(tensors: dict[str, torch.Tensor]) -> int:
    """Return the bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class Ours:
    """How this plugin saves and loads a training."""

    def __init__(self, folder: Path, trainer: Trainer, epoch_itr: iterators.EpochBatchIterator) -> None:
        self.folder, self.trainer, self.epoch_itr = folder / "ours", trainer, epoch_itr

    def save(self) -> None:
        """Write everything, and wait until it is on disk."""
        checkpoint_utils.save_checkpoint(self.trainer.cfg.checkpoint, self.trainer, self.epoch_itr, 1.0)

    def load(self, trainer: Trainer) -> None:
        """Load into another trainer."""
        trainer.load_checkpoint(str(self.folder / "checkpoint_last.pt"))


class RankByRank:
    """How fairseq saves and loads BASE layers: one file per rank with everything that it holds."""

    # fairseq's own functions, which the plugin replaces.
    state_dict = staticmethod(inspect.unwrap(Trainer.state_dict))
    write = staticmethod(inspect.unwrap(checkpoint_utils.torch_persistent_save))

    def __init__(self, folder: Path, trainer: Trainer) -> None:
        self.folder, self.trainer = folder / "fairseq", trainer
        names = [f"checkpoint_{which}-rank-{dist.get_rank()}.pt" for which in ("best", "last")]
        self.best, self.last = (str(self.folder / name) for name in names)

    def save(self) -> None:
        """Write everything; the system brings it to disk later."""
        self.write(utils.move_to_cpu(self.state_dict(self.trainer)), self.best)
        PathManager.copy(self.best, self.last, overwrite=True)

    def sync(self) -> None:
        """Wait until it is on disk."""
        for path in (self.best, self.last, self.folder):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def load(self, trainer: Trainer) -> None:
        """Load into another trainer. The plugin's models expect a state with all experts, so this state is copied
        directly.
        """
        with open(self.last, "rb") as file:
            state = torch.load(file, map_location=torch.device("cpu"))
        weights = state.pop("model")
        for name, tensor in trainer.get_model().state_dict().items():
            tensor.copy_(weights[name])
        del weights  # as in fairseq, before the optimizer is loaded
        trainer.optimizer.optimizer.load_state_dict(state["last_optimizer_state"])


def measure(way: "Ours | RankByRank", arguments: argparse.Namespace, folder: Path, copy: float) -> Record:
    """Save and load once; `copy` is the size of all parameters and moments.

    Raises:
        RuntimeError: on every rank, if the loaded state differs from the saved one.
    """
    if dist.get_rank() == 0:
        for other in ("ours", "fairseq"):
            shutil.rmtree(folder / other, ignore_errors=True)
        way.folder.mkdir()
        os.sync()
    saving = timed(way.save)
    syncing = timed(way.sync) if isinstance(way, RankByRank) else 0
    files = {file.stat().st_ino: file.stat().st_size for file in way.folder.rglob("*") if file.is_file()}

    free_unused_memory()
    before = anonymous_memory()
    trainer = make_trainer(arguments, folder)
    free_unused_memory()
    with watched_memory() as seen:
        loading = timed(lambda: way.load(trainer))

    saved, loaded = state_tensors(way.trainer), state_tensors(trainer)
    is_same = saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
    if over_ranks(not is_same, dist.ReduceOp.MAX):
        raise RuntimeError(f"{way.folder.name}: what was loaded is not what was saved")
    return {
        "save s": saving,
        "on disc s": saving + syncing,
        "MB": sum(files.values()) / 1e6,
        "copies": sum(files.values()) / copy,
        "load s": loading,
        "peak": over_ranks((max(seen) - before) / size(loaded), dist.ReduceOp.MAX),
    }


def compare(arguments: argparse.Namespace, folder: Path, display: Display) -> dict[str, list[Record]]:
    """Return the records of all rounds by way, and the `sizes` of the saved state."""
    display.begin("model", 1)
    trainer = make_trainer(arguments, folder)
    epoch_itr = trainer.get_train_iterator(epoch=1, load_dataset=True)
    with metrics.aggregate("train"):
        trainer.train_step(next(iter(iterators.GroupedIterator(epoch_itr.next_epoch_itr(), 1))))
    for parameter in trainer.get_model().parameters():
        parameter.grad = None
    held, experts = state_tensors(trainer), set(expert_names(trainer.get_model()))
    dense = size({name: tensor for name, tensor in held.items() if name.partition("/")[0] not in experts})
    shared = over_ranks(size(held) - dense, dist.ReduceOp.SUM)
    display.end(f"{arguments.experts} experts, with moments {shared / 1e9:.2f} GB; dense part {dense / 1e9:.2f} GB")

    ways = {"ours": Ours(folder, trainer, epoch_itr), "fairseq": RankByRank(folder, trainer)}
    rounds: dict[str, list[Record]] = {name: [] for name in ways}
    for number in range(arguments.repeats):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            step = f"round {number + 1} of {arguments.repeats}, {name}"
            display.begin(step, 1)
            record = measure(ways[name], arguments, folder, dense + shared)
            rounds[name].append(record)
            display.end(", ".join(f"{key} {shown(value)}" for key, value in record.items()))
    return {**rounds, "sizes": [{"experts": shared, "dense part": dense}]}


def be_rank(rank: int, arguments: argparse.Namespace, folder: Path) -> None:
    """Run one rank. The first rank shows the progress and writes the results to the folder."""
    torch.set_num_threads(1)
    logging.disable(logging.INFO)  # fairseq's report of every file
    warnings.simplefilter("ignore")  # many functions that fairseq calls are deprecated
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=arguments.processes)
    steps = 1 + 2 * arguments.repeats
    with Display(steps, Console(stderr=True, highlight=False, soft_wrap=True, quiet=rank > 0)) as display:
        results = compare(arguments, folder, display)
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    let_gloo_finish()
    dist.destroy_process_group()


def binarize(folder: Path) -> None:
    """Make a small corpus of random words in `folder`/bin."""
    draw = random.Random(1)
    words = [f"word{number}" for number in range(200)]
    lines = (" ".join(draw.choices(words, k=15)) for _ in range(400))
    (folder / "corpus.txt").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source", "--destdir", str(folder / "bin")]
    done = subprocess.run([*command, "--trainpref", str(folder / "corpus.txt")], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{sys.argv[0]}: fairseq-preprocess failed: {(done.stderr.strip() or 'no output').splitlines()[-1]}")


def shown(value: float) -> str:
    """Return a number with two decimals, or without decimals from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def spread(values: list[float]) -> str:
    """Return the median (smallest to largest) of all rounds, or their common value."""
    middle, least, most = map(shown, (statistics.median(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least} to {most})"


def table(results: dict[str, list[Record]]) -> list[str]:
    """Return the lines of the table."""
    ours, fairseq = results["ours"], results["fairseq"]
    ratios = [{key: a[key] / b[key] for key in COLUMNS} for a, b in zip(ours, fairseq, strict=True)]
    lines = [f"| | {' | '.join(COLUMNS)} |", "|" + "---|" * (len(COLUMNS) + 1)]
    for name, records in (("ours", ours), ("fairseq", fairseq), ("ours / fairseq", ratios)):
        lines.append(f"| {name} | {' | '.join(spread([record[key] for record in records]) for key in COLUMNS)} |")
    return lines


def parse() -> argparse.Namespace:
    """Return the arguments, checked, with the number of `experts`."""
    room = "--folder must have 7.5 times --experts-gb free; memory of about 10 times --experts-gb is needed"
    parser = Parser(description=__doc__.splitlines()[0], epilog=room)
    parser.add_argument("--experts-gb", type=float, default=1.0, metavar="GB", help="of fp32 weights (default: 1.0)")
    parser.add_argument("--processes", type=int, default=4, metavar="P", help="ranks, 2 or more (default: 4)")
    parser.add_argument("--width", type=int, default=1024, metavar="D", help="of a token (default: 1024)")
    parser.add_argument("--hidden", type=int, default=4096, metavar="F", help="width within an expert (default: 4096)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="saves and loads of each (default: 3)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write what is printed to a file")
    arguments = parser.parse_args()
    for name, least in (("processes", 2), ("width", 4), ("hidden", 1), ("repeats", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} {getattr(arguments, name)} is out of range; give a number of {least} or more")
    if arguments.width % 8:
        parser.error(f"--width {arguments.width} is no multiple of 8 (4 heads of even width); give one")
    if not 0 < arguments.experts_gb < 1000:  # NaN is none either
        parser.error(f"--experts-gb {arguments.experts_gb} is out of range; give a number of more than 0, below 1000")
    if not arguments.folder.is_dir():
        parser.error(f"--folder {arguments.folder} does not exist; make it first")
    if arguments.out and not arguments.out.parent.is_dir():
        parser.error(f"--out {arguments.out}: the folder {arguments.out.parent} does not exist; make it first")
    if not Path("/proc/self/io").is_file():
        parser.error("this system has no /proc/self/io; run this on Linux")
    one = 4 * (2 * arguments.width * arguments.hidden + arguments.width + arguments.hidden)
    ranks = arguments.processes
    arguments.experts = max(1, round(arguments.experts_gb * 1e9 / one / ranks)) * ranks
    # This counts both moments, fairseq's files twice, and a quarter for the dense part of every rank.
    free, need = shutil.disk_usage(arguments.folder).free / 1e9, 3 * 2 * 1.25 * arguments.experts * one / 1e9
    if free < need:
        parser.error(f"--folder {arguments.folder} has {free:.1f} GB free and needs {need:.1f}; give another")
    return arguments


def main() -> None:
    """Measure, print provenance and table, and write them to a file if asked for."""
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # after removing the temporary folder
    given = ("experts_gb", "processes", "width", "hidden", "repeats")
    command = " ".join(f"--{name.replace('_', '-')} {getattr(arguments, name)}" for name in given)
    lines = ["# Checkpoints", "", f"`python benchmarks/checkpoints.py {command}`, which defines the columns"]
    lines += ["", *listed(provenance())]
    df = subprocess.run(["df", "--output=fstype", str(arguments.folder)], capture_output=True, text=True)
    file_system = (df.stdout.split() or ["unknown"])[-1]
    with tempfile.TemporaryDirectory(prefix="checkpoints ", dir=arguments.folder) as name:
        folder = Path(name).absolute()
        binarize(folder)
        ranks = torch.multiprocessing.spawn(be_rank, (arguments, folder), arguments.processes, join=False)
        try:
            while not ranks.join():
                pass
        finally:  # also when interrupted: no rank may write while the folder is removed
            for process in ranks.processes:
                process.kill()
                process.join()
        results = json.loads((folder / "results.json").read_text())
    sizes = " MB, ".join(f"{name} {size / 1e6:.0f}" for name, size in results["sizes"][0].items())
    lines += [f"- file system: {file_system}", f"- parameters and moments of {arguments.experts} experts: {sizes} MB"]
    lines += ["", *table(results)]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
