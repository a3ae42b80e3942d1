#!/usr/bin/env python3
"""How long does `fairseq-eval-lm` take for a model whose experts do not fit into memory, and how long in memory?

    python benchmarks/mapped_model.py [--experts N] [--layers N] [--width D] [--limit-gb GB] [--tokens 1024,4096]
        [--batches N] [--rounds N] [--folder FOLDER] [--out FILE]

A model with experts in all of its layers, 4.8 GB of them in fp32 unless told otherwise, is trained for one update; its
tables are random, one for each layer, and so are the tokens. It is evaluated in three ways, each in a process of its
own:

- memory: all experts are in memory, without a limit.
- touched: `map_experts` without reading ahead: what computes is read when it is touched.
- ahead: `map_experts`.

The last two run in a cgroup whose memory, page cache included, is limited: this needs root and Linux. Before each
process the shards leave the system's page cache. In every round all ways take their turn, in changing order. Their
perplexities have to be the same.

Columns, for each size of a batch: seconds that the model needs for all batches in memory, without loading it; the
ratios to it of the other two within a round; the ratio of the whole process of `ahead`, start and loading included; GB
that `ahead` reads from the disk, loading included, where all of the file is read once for its checksums; and what the
disk allows: the time to read the experts once for each batch at the disk's own speed, over the seconds in memory, and 1
where that is less. All are medians (smallest to largest) over rounds. The disk's own speed is measured in each round: a
cold read of a shard, asked for as reading ahead asks.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from fairseq.data import indexed_dataset

from fairseq_hash.cli import Parser
from fairseq_hash.core.progress import Display
from fairseq_hash.moe import read_ahead
from fairseq_hash.provenance import listed, provenance

USER_DIR = str(Path(__file__).parents[1] / "fairseq_hash")
SYMBOLS, SAMPLE = 400, 256
WAYS = ("memory", "touched", "ahead")
EVALUATE = "from fairseq_cli import eval_lm; eval_lm.cli_main()"
NOT_AHEAD = (
    "import fairseq_hash as f; f.register(); from fairseq_hash.moe import read_ahead; read_ahead._madvise = None; "
)


def write_data(folder: Path, sizes: "list[int]", batches: int) -> None:
    """Write a dictionary, and random tokens: splits for training and validation, and one for each size of a batch."""
    (folder / "dict.txt").write_text("".join(f"piece{number} 1\n" for number in range(SYMBOLS)))
    generator = torch.Generator().manual_seed(1)
    splits = {"train": 4 * SAMPLE, "valid": SAMPLE, **{f"test{size}": size * batches for size in sizes}}
    for split, count in splits.items():
        builder = indexed_dataset.make_builder(str(folder / f"{split}.bin"), impl="mmap", vocab_size=SYMBOLS)
        builder.add_item(torch.randint(4, SYMBOLS + 4, (count,), generator=generator))
        builder.finalize(str(folder / f"{split}.idx"))


def train(data: Path, run: Path, arguments: argparse.Namespace) -> list[Path]:
    """Make the checkpoint; return its shards."""
    command = [sys.executable, "-m", "fairseq_cli.train", str(data), "--save-dir", str(run), "--user-dir", USER_DIR]
    command += ["--sparse-layers", ",".join(map(str, range(arguments.layers))), "--num-experts", str(arguments.experts)]
    command += ["--decoder-layers", str(arguments.layers), "--decoder-embed-dim", str(arguments.width)]
    command += ["--decoder-ffn-embed-dim", str(4 * arguments.width), "--max-tokens", str(SAMPLE)]
    command += (
        "--task language_modeling --arch hash_transformer_lm --criterion hash_moe --router hash --hash-table random "
        f"--hash-per-layer --tokens-per-sample {SAMPLE} --sample-break-mode none --optimizer sgd --lr 0.001 "
        "--max-update 1 --no-save-optimizer-state --no-epoch-checkpoints --disable-validation --cpu --seed 1"
    ).split()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{sys.argv[0]}: the training failed: {(done.stderr.strip() or '?').splitlines()[-1]}")
    return sorted((run / "experts").iterdir())


def leave_cache(path: Path) -> None:
    """Take a file out of the system's page cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_speed(path: Path) -> float:
    """Return the bytes per second of a cold read of a file, asked for as reading ahead asks."""
    leave_cache(path)
    size = path.stat().st_size
    content = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage.from_file(str(path), False, size))
    start = time.perf_counter()
    read_ahead.read(list(content.split(read_ahead.CHUNK)))
    return size / (time.perf_counter() - start)


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


def evaluate(data: Path, run: Path, way: str, size: int, limit: int) -> dict[str, float]:
    """Return seconds of the model and of the process, GB that were read, and the perplexity of one evaluation."""
    overrides = {} if way == "memory" else {"map_experts": True}
    command = [sys.executable, "-c", (NOT_AHEAD if way == "touched" else "") + EVALUATE, str(data), "--cpu"]
    command += ["--user-dir", USER_DIR, "--path", str(run / "checkpoint_last.pt"), "--model-overrides", str(overrides)]
    command += ["--gen-subset", f"test{size}", "--max-tokens", str(size), "--tokens-per-sample", str(SAMPLE)]
    with limited(limit) as procs:

        def enter() -> None:
            if way != "memory":
                procs.write_text(str(os.getpid()))

        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=enter
        )
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
    found = re.search(r"tokens in ([\d.]+)s", said), re.search(r"Perplexity: ([\d.]+)", said)
    if process.returncode or not all(found):
        last = said.strip().splitlines()[-1] if said.strip() else "nothing was said"
        sys.exit(f"{sys.argv[0]}: {way} ended with status {process.returncode} (-9: killed for memory): {last}")
    model, perplexity = (float(one[1]) for one in found)
    return {"model": model, "process": seconds, "read": usage.ru_inblock * 512 / 1e9, "perplexity": perplexity}


def spread(values: "list[float]", digits: int = 2) -> str:
    """Return the median (smallest to largest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(rounds: "list[dict]", speeds: "list[float]", sizes: "list[int]", needed: float) -> list[str]:
    """Return the lines of the table; `needed` is the bytes of experts in all batches."""
    headings = ("tokens of a batch", "memory s", "touched / memory", "ahead / memory", "of processes", "ahead GB")
    headings += ("the disk allows",)
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for size in sizes:
        memory, touched, ahead = ([one[size][way] for one in rounds] for way in WAYS)
        ratios = [
            [mine[of] / base[of] for mine, base in zip(way, memory, strict=True)]
            for way, of in ((touched, "model"), (ahead, "model"), (ahead, "process"))
        ]
        allowed = [max(1.0, needed / speed / base["model"]) for speed, base in zip(speeds, memory, strict=True)]
        seconds, read = ([record[of] for record in way] for way, of in ((memory, "model"), (ahead, "read")))
        cells = [f"{size:,}", spread(seconds, 1), *map(spread, ratios), spread(read, 1), spread(allowed)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sizes_of(text: str) -> list[int]:
    """Return numbers that stand between commas."""
    return [int(size) for size in text.split(",")]


def parse() -> argparse.Namespace:
    """Return the command's arguments, checked."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=48, metavar="E", help="of a layer (default: 48)")
    parser.add_argument("--layers", type=int, default=12, metavar="N", help="default: 12")
    parser.add_argument("--width", type=int, default=512, metavar="D", help="a multiple of 64 (default: 512)")
    parser.add_argument(
        "--limit-gb", type=float, default=0.95, metavar="GB", help="of a mapped process (default: 0.95)"
    )
    parser.add_argument(
        "--tokens", type=sizes_of, default="1024,4096", metavar="T,T", help="sizes of batches (default: %(default)s)"
    )
    parser.add_argument("--batches", type=int, default=4, metavar="N", help="of each size (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write what is printed to a file")
    arguments = parser.parse_args()
    given = ("experts", "layers", "width", "limit_gb", "tokens", "batches", "rounds")
    arguments.given = " ".join(
        f"--{name.replace('_', '-')} {str(getattr(arguments, name)).strip('[]').replace(', ', ',')}" for name in given
    )
    return arguments


def main() -> None:
    """Measure, print provenance and table, and write them to a file if asked for."""
    arguments = parse()
    rounds, speeds, sizes = [], [], arguments.tokens
    with tempfile.TemporaryDirectory(prefix="mapped model-", dir=arguments.folder) as name:
        data, run = Path(name) / "data", Path(name) / "run"
        data.mkdir()
        write_data(data, sizes, arguments.batches)
        with Display(1 + arguments.rounds * len(sizes) * len(WAYS)) as display:
            display.begin("the model", 1)
            shards = train(data, run, arguments)
            total = sum(path.stat().st_size for path in shards)
            display.end(f"{total / 1e9:.2f} GB of experts")
            for number in range(arguments.rounds):
                speeds.append(disk_speed(shards[0]))
                found: dict = {size: {} for size in sizes}
                for size in sizes:
                    for way in WAYS if number % 2 else reversed(WAYS):
                        display.begin(f"{size} tokens, {way}", 1)
                        for path in shards:
                            leave_cache(path)
                        found[size][way] = evaluate(data, run, way, size, int(arguments.limit_gb * 1e9))
                        display.end(f"{found[size][way]['model']:.1f} s")
                rounds.append(found)
    for size in sizes:
        if len({one[size][way]["perplexity"] for one in rounds for way in WAYS}) > 1:
            sys.exit(f"{sys.argv[0]}: the perplexities with {size} tokens differ between ways")
    lines = ["# A model whose experts stay in files", ""]
    lines += [f"`python benchmarks/mapped_model.py {arguments.given}`, which defines the columns", ""]
    lines += listed(provenance())
    lines += [f"- threads of a process: {os.environ.get('OMP_NUM_THREADS', 'all cores')}"]
    lines += [f"- experts: {total / 1e9:.2f} GB; memory of the processes of touched and ahead: {arguments.limit_gb} GB"]
    lines += [f"- the disk's own speed: {spread([speed / 1e6 for speed in speeds], 0)} MB/s"]
    lines += ["- perplexities: the same in all ways", ""]
    lines += table(rounds, speeds, sizes, total * arguments.batches)
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
