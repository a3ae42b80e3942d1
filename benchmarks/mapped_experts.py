#!/usr/bin/env python3
"""How long does an evaluation take whose experts do not fit into memory, compared with the same model in memory?

    python benchmarks/mapped_experts.py [--experts-gb GB] [--limit-gb GB] [--tokens 16,256,1024] [--rounds N]
        [--folder FOLDER] [--out FILE]

A file has the experts of some layers, random; between two layers of experts stands a dense product, three times as wide
as a token, in place of attention. The tokens go to the experts in turn. This is evaluated in three ways, each in a
process of its own:

- memory: all experts are in memory, without a limit.
- mapped: experts in the file, without reading ahead: what a layer touches is read when it touches it.
- ahead: experts in the file, read ahead, as `map_experts` does.

The mapped ways run in a cgroup whose memory, page cache included, is limited: this needs root and Linux. Before each
process the file leaves the system's page cache. In every round all ways take their turn, in changing order. The first
forward pass of each number of tokens is a warm-up. Outputs have to be equal to the bit in all ways.

Columns, for each size of a batch: seconds of a forward pass in memory; the ratio to it of the mapped ways within a
round; GB that each reads from the disk in a forward pass; and what the disk allows: the time to read the GB of `ahead`
at the disk's own speed, over the time in memory, and 1 where that is less. All are medians (smallest to largest) over
rounds. The disk's own speed is measured in each round: a cold read of the file, asked for as reading ahead asks.
"""

import argparse
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fairseq_hash.cli import Parser
from fairseq_hash.core.progress import Display
from fairseq_hash.moe import read_ahead
from fairseq_hash.moe.experts import ExpertFeedForward
from fairseq_hash.moe.mapped_experts import MappedExperts
from fairseq_hash.moe.read_ahead import ReadAhead
from fairseq_hash.provenance import listed, provenance

WAYS = ("memory", "mapped", "ahead")


def build(arguments: argparse.Namespace) -> ExpertFeedForward:
    """Return a layer's experts without data."""
    with torch.device("meta"):
        return ExpertFeedForward(range(arguments.experts), arguments.width, 4 * arguments.width, torch.relu, 0.0, (0,))


def write_file(path: Path, arguments: argparse.Namespace) -> None:
    """Write random parameters of all layers, one after the other, and wait until they are on the disk."""
    generator = torch.Generator().manual_seed(1)
    with open(path, "wb") as file:
        for _ in range(arguments.layers):
            for parameter in build(arguments).parameters():
                file.write((torch.randn(parameter.shape, generator=generator) / 32).numpy())
        os.fsync(file.fileno())


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
    read_ahead.read(list(content.split(1 << 26)))
    return size / (time.perf_counter() - start)


def bytes_read() -> int:
    """Return the bytes that this process has read from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def read_layers(arguments: argparse.Namespace) -> list[MappedExperts]:
    """Return all layers, with their parameters in the file or in memory."""
    path, layers, place = arguments.folder, [], 0
    stored = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    values = torch.empty(0).set_(stored)
    for _ in range(arguments.layers):
        layers.append(MappedExperts(build(arguments)))
        for name, parameter in layers[-1].shell.named_parameters():
            value = values[place : place + parameter.numel()].view(parameter.shape)
            layers[-1].leave_in_file(name, value.clone() if arguments.be == "memory" else value)
            place += parameter.numel()
    return layers


def evaluate(arguments: argparse.Namespace) -> "dict[str, dict[str, float | str]]":
    """Return, by the number of tokens, the seconds and GB of a forward pass in this process, and a print of y."""
    layers, width = read_layers(arguments), arguments.width
    generator = torch.Generator().manual_seed(2)
    dense_DH, dense_HD = (
        torch.randn(shape, generator=generator) / 32 for shape in ((width, 3 * width), (3 * width, width))
    )

    def forward(x_TD: Tensor) -> Tensor:
        sizes = tuple(len(x_TD[expert :: arguments.experts]) for expert in range(arguments.experts))
        is_ahead = arguments.be == "ahead"
        reader = ReadAhead([(layer, layer.serving(sizes)) for layer in layers]) if is_ahead else None
        for layer in layers:
            x_TD = torch.nn.functional.layer_norm(x_TD + x_TD @ dense_DH @ dense_HD, (width,))
            x_TD = x_TD + (layer(x_TD, sizes) if reader is None else reader.run(layer, x_TD, sizes))
        return x_TD

    results: dict[str, dict[str, float | str]] = {}
    for size in arguments.tokens:
        digest, seconds, read = hashlib.sha256(), [], []
        for _ in range(1 + arguments.passes):
            x_TD = torch.randn(size, width, generator=generator)
            before, start = bytes_read(), time.perf_counter()
            with torch.inference_mode():
                y_TD = forward(x_TD)
            seconds.append(time.perf_counter() - start)
            read.append(bytes_read() - before)
            digest.update(y_TD.numpy().tobytes())
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
    leave_cache(path)
    command = [sys.executable, __file__, "--be", way, "--folder", str(path), *arguments.given.split()]
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
    parser.add_argument("--experts-gb", type=float, default=2.5, metavar="GB", help="all experts, fp32 (default: 2.5)")
    parser.add_argument("--limit-gb", type=float, default=0.5, metavar="GB", help="of a mapped process (default: 0.5)")
    parser.add_argument("--layers", type=int, default=48, metavar="N", help="layers (default: 48)")
    parser.add_argument("--width", type=int, default=256, metavar="D", help="of a token; experts have 4 times as much")
    parser.add_argument("--tokens", default="16,256,1024", metavar="T,T", help="sizes of batches")
    parser.add_argument("--passes", type=int, default=1, metavar="N", help="forward passes of a size (default: 1)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write what is printed to a file")
    parser.add_argument("--be", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    given = ("experts_gb", "limit_gb", "layers", "width", "tokens", "passes", "rounds")
    arguments.given = " ".join(f"--{name.replace('_', '-')} {getattr(arguments, name)}" for name in given)
    arguments.tokens = [int(size) for size in arguments.tokens.split(",")]
    arguments.experts = round(arguments.experts_gb * 1e9 / arguments.layers / (4 * 8 * arguments.width**2))
    return arguments


def main() -> None:
    """Measure, print provenance and table, and write them to a file if asked for."""
    arguments = parse()
    if arguments.be:
        print(json.dumps(evaluate(arguments)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # after removing the temporary folder
    rounds, speeds = [], []
    with tempfile.TemporaryDirectory(prefix="mapped_experts-", dir=arguments.folder) as name:
        path = Path(name) / "experts"
        write_file(path, arguments)
        size = path.stat().st_size
        with Display(arguments.rounds * len(WAYS)) as display:
            for number in range(arguments.rounds):
                speeds.append(disk_speed(path))
                found = {}
                for way in WAYS if number % 2 else reversed(WAYS):
                    display.begin(way, 1)
                    found[way] = run_way(path, way, arguments)
                    display.end("done")
                rounds.append(found)
    for size_ in map(str, arguments.tokens):
        if len({one[way][size_]["print"] for one in rounds for way in WAYS}) > 1:
            sys.exit(f"{sys.argv[0]}: the outputs of {size_} tokens differ between ways")
    lines = [
        "# Experts in files",
        "",
        f"`python benchmarks/mapped_experts.py {arguments.given}`, which defines the columns",
        "",
    ]
    lines += listed(provenance())
    lines += [f"- threads: {torch.get_num_threads()}"]
    lines += [f"- experts: {size / 1e9:.2f} GB, {arguments.experts} in each of {arguments.layers} layers; the mapped "]
    lines[-1] += f"processes' memory: {arguments.limit_gb} GB"
    lines += [f"- the disk's own speed: {spread([speed / 1e6 for speed in speeds], 0)} MB/s"]
    lines += ["- outputs: equal to the bit in all ways", "", *table(rounds, speeds, arguments.tokens)]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
