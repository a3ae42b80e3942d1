#!/usr/bin/env python3
"""How long does an evaluation take whose experts do not fit into memory, compared with the same model in memory?

    python benchmarks/mapped_experts.py [--router hash] [--experts-gb GB] [--limit-gb GB] [--tokens 16,512,2048]
        [--shards N] [--rounds N] [--folder FOLDER] [--out FILE]

A checkpoint with random weights is evaluated in three ways, each in a process of its own:

- memory: all experts are in memory, without a limit.
- mapped: `map_experts` without reading ahead: what a layer touches is read when it touches it.
- ahead: `map_experts` as it is.

The mapped ways run in a cgroup whose memory, page cache included, is limited: this needs root and Linux. Before each
process the checkpoint leaves the system's page cache. In every round all ways take their turn, in changing order;
within a process the sizes of batches do. Each forward pass has other random tokens, in sentences of up to 128. The
first one of each size is a warm-up. Logits have to be equal to the bit in all ways.

Columns, for each size of a batch: seconds of a forward pass in memory; the ratio to it of the mapped ways within a
round; GB that each reads from the disk in a forward pass; and what the disk allows: the time to read the GB of `ahead`
at the disk's own speed, over the time in memory, and 1 where that is less. All are medians (smallest to largest) over
rounds. The disk's own speed is measured in each round: a cold read of the largest shard in order.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fairseq_hash

fairseq_hash.register()  # before fairseq is imported, to suppress its messages

# ruff: noqa: E402
import torch
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer

from fairseq_hash.cli import Parser
from fairseq_hash.core.progress import Display
from fairseq_hash.core.quiet import only_warnings
from fairseq_hash.lm import decoder
from fairseq_hash.provenance import provenance

WAYS = ("memory", "mapped", "ahead")
LENGTH = 128  # tokens of a sentence, at most
Record = dict[str, float]


def make_checkpoint(folder: Path, arguments: argparse.Namespace) -> Path:
    """Write a checkpoint with random weights; return its path."""
    draw = random.Random(1)
    words = [f"word{number}" for number in range(4000)]
    (folder / "corpus.txt").write_text("".join(" ".join(draw.choices(words, k=15)) + "\n" for _ in range(4000)))
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source", "--destdir", str(folder / "bin")]
    subprocess.run([*command, "--trainpref", str(folder / "corpus.txt")], check=True, capture_output=True)
    given = [str(folder / "bin"), "--task", "language_modeling", "--user-dir", str(Path(fairseq_hash.__file__).parent)]
    given += f"--arch hash_transformer_lm_tiny --decoder-layers {arguments.layers} --criterion hash_moe".split()
    given += f"--decoder-embed-dim {arguments.width} --decoder-ffn-embed-dim {4 * arguments.width}".split()
    given += f"--decoder-attention-heads 4 --router {arguments.router} --num-experts {arguments.experts}".split()
    given += f"--sparse-layers {','.join(map(str, range(arguments.layers)))} --tokens-per-sample {LENGTH}".split()
    given += "--max-tokens 256 --optimizer sgd --lr 1 --cpu --num-workers 0 --no-save-optimizer-state".split()
    given += ["--no-epoch-checkpoints", "--save-dir", str(folder / "saved")]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), given))
    utils.set_torch_seed(1)
    task = tasks.setup_task(cfg.task)
    trainer = Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))
    epoch_itr = trainer.get_train_iterator(epoch=1, load_dataset=True)
    epoch_itr.next_epoch_itr()
    checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
    path = folder / "saved" / "checkpoint_last.pt"
    if arguments.shards > 1:
        command = [sys.executable, "-m", "fairseq_hash.cli", "checkpoint", "split", str(path), "--shards"]
        subprocess.run([*command, str(arguments.shards), "--out", str(folder / "split" / "cut.pt")], check=True)
        shutil.rmtree(folder / "saved")
        path = folder / "split" / "cut.pt"
    return path


def leave_cache(folder: Path) -> None:
    """Take all files of a folder out of the system's page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_speed(folder: Path) -> float:
    """Return the bytes per second of a cold read of the largest file."""
    leave_cache(folder)
    path = max(folder.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    piece, start = bytearray(1 << 20), time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(piece):
            pass
    return path.stat().st_size / (time.perf_counter() - start)


def bytes_read() -> int:
    """Return the bytes that this process has read from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def evaluate(path: Path, way: str, sizes: "list[int]", passes: int) -> "dict[str, dict[str, float | str]]":
    """Return, by the size of the batch, the seconds and GB of a forward pass in this process, and a print of logits."""
    if way == "mapped":
        decoder.ReadAhead = lambda layers: None
    loaded = fairseq_hash.load(path, map_experts=way != "memory")
    results: dict[str, dict[str, float | str]] = {}
    for size in sizes:
        generator = torch.Generator().manual_seed(size)
        digest, seconds, read = hashlib.sha256(), [], []
        for _ in range(1 + passes):
            length = min(size, LENGTH)
            tokens = torch.randint(4, len(loaded.dictionary), (size // length, length), generator=generator)
            before, start = bytes_read(), time.perf_counter()
            with torch.inference_mode():
                logits = loaded.model(tokens)[0]
            seconds.append(time.perf_counter() - start)
            read.append(bytes_read() - before)
            digest.update(logits.numpy().tobytes())
        medians = {"seconds": statistics.median(seconds[1:]), "read": statistics.median(read[1:]) / 1e9}
        results[str(size)] = {**medians, "print": digest.hexdigest()}
    return results


@contextmanager
def limited(limit: int) -> "Iterator[Path]":
    """Yield the file of a new cgroup of so many bytes of memory: who writes its process id there is limited."""
    of_process = {line.split(":")[1]: line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().split()}
    if "memory" in of_process:  # cgroup v1
        above, name = Path(f"/sys/fs/cgroup/memory{of_process['memory']}"), "memory.limit_in_bytes"
    else:
        above, name = Path(f"/sys/fs/cgroup{of_process['']}"), "memory.max"
    group = above / f"fairseq_hash-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(limit))
    except OSError as error:
        sys.exit(f"{sys.argv[0]}: {group} cannot limit memory ({error.strerror}); run this as root, with cgroups")
    try:
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def run_way(path: Path, way: str, arguments: argparse.Namespace) -> "dict[str, dict[str, float | str]]":
    """Return what `evaluate` returns, in a new process, limited if its experts are mapped."""
    leave_cache(path.parent)
    command = [sys.executable, __file__, "--be", way, "--tokens", ",".join(map(str, arguments.tokens))]
    command += ["--passes", str(arguments.passes), "--folder", str(path)]
    with limited(int(arguments.limit_gb * 1e9)) as procs:

        def enter() -> None:
            procs.write_text(str(os.getpid()))

        done = subprocess.run(
            command, capture_output=True, text=True, preexec_fn=None if way == "memory" else enter, check=False
        )
    if done.returncode:
        sys.exit(f"{sys.argv[0]}: {way} failed: {(done.stderr.strip() or str(done.returncode)).splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: "list[float]", digits: int = 2) -> str:
    """Return the median (smallest to largest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(rounds: "list[dict[str, dict]]", speeds: "list[float]", sizes: "list[int]") -> list[str]:
    """Return the lines of the table."""
    headings = ("tokens", "memory s", "mapped / memory", "ahead / memory", "mapped GB", "ahead GB", "the disk allows")
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for size in map(str, sizes):
        of_way = {way: [one[way][size] for one in rounds] for way in WAYS}
        seconds = {way: [record["seconds"] for record in of_way[way]] for way in WAYS}
        read = {way: [record["read"] for record in of_way[way]] for way in WAYS}
        ratios = [spread([a / b for a, b in zip(seconds[way], seconds["memory"], strict=True)]) for way in WAYS[1:]]
        allowed = [
            max(1.0, gb * 1e9 / speed / second)
            for gb, speed, second in zip(read["ahead"], speeds, seconds["memory"], strict=True)
        ]
        gigabytes = [f"{statistics.median(read[way]):.2f}" for way in WAYS[1:]]
        lines.append(f"| {' | '.join([size, spread(seconds['memory']), *ratios, *gigabytes, spread(allowed)])} |")
    return lines


def parse() -> argparse.Namespace:
    """Return the command's arguments, checked."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router", default="hash", help="default: hash")
    parser.add_argument("--experts-gb", type=float, default=3.0, metavar="GB", help="all experts, fp32 (default: 3.0)")
    parser.add_argument("--limit-gb", type=float, default=0.6, metavar="GB", help="of a mapped process (default: 0.6)")
    parser.add_argument("--layers", type=int, default=48, metavar="N", help="decoder layers, all sparse (default: 48)")
    parser.add_argument("--width", type=int, default=256, metavar="D", help="of a token; experts have 4 times as much")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="of the checkpoint (default: 1)")
    parser.add_argument("--tokens", default="16,512,2048", metavar="T,T", help="sizes of batches")
    parser.add_argument("--passes", type=int, default=1, metavar="N", help="forward passes of a size (default: 1)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write what is printed to a file")
    parser.add_argument("--be", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.tokens = [int(size) for size in arguments.tokens.split(",")]
    arguments.experts = round(arguments.experts_gb * 1e9 / arguments.layers / (4 * 8 * arguments.width**2))
    return arguments


def main() -> None:
    """Measure, print provenance and table, and write them to a file if asked for."""
    arguments = parse()
    if arguments.be:
        print(json.dumps(evaluate(arguments.folder, arguments.be, arguments.tokens, arguments.passes)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # after removing the temporary folder
    rounds, speeds = [], []
    with tempfile.TemporaryDirectory(prefix="mapped_experts-", dir=arguments.folder) as name:
        with only_warnings("fairseq", "fairseq_hash"):
            path = make_checkpoint(Path(name), arguments)
        size = sum(file.stat().st_size for file in path.parent.rglob("*.safetensors"))
        with Display(arguments.rounds * len(WAYS)) as display:
            for number in range(arguments.rounds):
                speeds.append(disk_speed(path.parent))
                found = {}
                for way in WAYS if number % 2 else reversed(WAYS):
                    display.begin(way, 1)
                    found[way] = run_way(path, way, arguments)
                    display.end("done")
                rounds.append(found)
    for size_ in map(str, arguments.tokens):
        if len({one[way][size_]["print"] for one in rounds for way in WAYS}) > 1:
            sys.exit(f"{sys.argv[0]}: the logits of {size_} tokens differ between ways")
    given = ("router", "experts_gb", "limit_gb", "layers", "width", "shards", "passes", "rounds")
    command = " ".join(f"--{name.replace('_', '-')} {getattr(arguments, name)}" for name in given)
    command += f" --tokens {','.join(map(str, arguments.tokens))}"
    lines = [f"`python benchmarks/mapped_experts.py {command}`, which defines the columns", ""]
    lines += [f"- {name}: {value}" for name, value in provenance().items() if value]
    lines += [f"- threads: {torch.get_num_threads()}"]
    lines += [f"- experts: {size / 1e9:.2f} GB, {arguments.experts} in each of {arguments.layers} layers; the mapped "]
    lines[-1] += f"processes' memory: {arguments.limit_gb} GB"
    lines += [f"- the disk's own speed: {spread([speed / 1e6 for speed in speeds], 0)} MB/s"]
    lines += ["- logits: equal to the bit in all ways", "", *table(rounds, speeds, arguments.tokens)]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
