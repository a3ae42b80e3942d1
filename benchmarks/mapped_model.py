#!/usr/bin/env python3
"""How long does `fairseq-eval-lm` take for a model whose experts do not fit into memory, and how long in memory?

    python benchmarks/mapped_model.py [--limit-gb GB] [--tokens 2048,4096] [--batches N] [--rounds N]
        [--folder FOLDER] [--out FILE]

A model of 12 sparse layers with 48 experts each, 4.8 GB of experts in fp32, is trained for one update; its tables are
random, one for each layer, and so are the tokens. It is evaluated in two ways, each in a process of its own:

- memory: all experts are in memory, without a limit.
- mapped: `map_experts`, in a cgroup whose memory, page cache included, is limited: this needs root and Linux.

Before each process the shards leave the system's page cache. In every round both ways take their turn, in changing
order. Their perplexities have to be the same.

Columns, for each size of a batch: seconds that the model needs for all batches in memory, without loading it; the ratio
to it of `mapped` within a round; the same ratio of the whole processes, start and loading included; GB that `mapped`
reads from the disk, loading included, where all of the file is read once for its checksums; and what the disk allows:
the time to read the experts once for each batch at the disk's own speed, over the seconds in memory, and 1 where that
is less. All are medians (smallest to largest) over rounds.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from fairseq.data import indexed_dataset
from mapped_experts import disk_speed, leave_cache, limited, spread

from fairseq_hash.cli import Parser
from fairseq_hash.core.progress import Display
from fairseq_hash.provenance import listed, provenance

USER_DIR = str(Path(__file__).parents[1] / "fairseq_hash")
LAYERS, EXPERTS, SYMBOLS, SAMPLE = 12, 48, 400, 256
MODEL = (
    f"--router hash --hash-table random --hash-per-layer --num-experts {EXPERTS} --decoder-layers {LAYERS} "
    f"--sparse-layers {','.join(map(str, range(LAYERS)))} --decoder-embed-dim 512 --decoder-ffn-embed-dim 2048 "
    "--decoder-attention-heads 8"
)
ONE_UPDATE = (
    f"--tokens-per-sample {SAMPLE} --sample-break-mode none --max-tokens {SAMPLE} --optimizer sgd --lr 0.001 "
    "--max-update 1 --no-save-optimizer-state --no-epoch-checkpoints --disable-validation --cpu --seed 1"
)
WAYS = ("memory", "mapped")


def write_data(folder: Path, sizes: "list[int]", batches: int) -> None:
    """Write a dictionary, and random tokens: splits for training and validation, and one for each size of a batch."""
    (folder / "dict.txt").write_text("".join(f"piece{number} 1\n" for number in range(SYMBOLS)))
    generator = torch.Generator().manual_seed(1)
    for split, count in {
        "train": 4 * SAMPLE,
        "valid": SAMPLE,
        **{f"test{size}": size * batches for size in sizes},
    }.items():
        builder = indexed_dataset.make_builder(str(folder / f"{split}.bin"), impl="mmap", vocab_size=SYMBOLS)
        builder.add_item(torch.randint(4, SYMBOLS + 4, (count,), generator=generator))
        builder.finalize(str(folder / f"{split}.idx"))


def train(data: Path, run: Path) -> list[Path]:
    """Make the checkpoint; return its shards."""
    command = [sys.executable, "-m", "fairseq_cli.train", str(data), "--save-dir", str(run), "--user-dir", USER_DIR]
    command += ["--task", "language_modeling", "--arch", "hash_transformer_lm", "--criterion", "hash_moe"]
    command += [*MODEL.split(), *ONE_UPDATE.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{sys.argv[0]}: the training failed: {(done.stderr.strip() or '?').splitlines()[-1]}")
    return sorted((run / "experts").iterdir())


def evaluate(data: Path, run: Path, way: str, size: int, limit: int) -> dict[str, float]:
    """Return seconds of the model and of the process, GB that were read, and the perplexity of one evaluation."""
    overrides = {"map_experts": True} if way == "mapped" else {}
    command = [sys.executable, "-m", "fairseq_cli.eval_lm", str(data), "--user-dir", USER_DIR, "--cpu"]
    command += ["--path", str(run / "checkpoint_last.pt"), "--gen-subset", f"test{size}", "--max-tokens", str(size)]
    command += ["--tokens-per-sample", str(SAMPLE), "--sample-break-mode", "none", "--model-overrides", str(overrides)]
    with limited(limit) as procs:

        def enter() -> None:
            if way == "mapped":
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
        last = said.strip().splitlines()[-1] if said.strip() else f"status {process.returncode}"
        sys.exit(f"{sys.argv[0]}: {way} failed: {last}")
    model, perplexity = (float(one[1]) for one in found)
    return {"model": model, "process": seconds, "read": usage.ru_inblock * 512 / 1e9, "perplexity": perplexity}


def table(rounds: "list[dict]", speeds: "list[float]", sizes: "list[int]", gigabytes: float) -> list[str]:
    """Return the lines of the table."""
    headings = ("tokens of a batch", "memory s", "mapped / memory", "of processes", "mapped GB", "the disk allows")
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for size in sizes:
        of_way = {way: [one[size][way] for one in rounds] for way in WAYS}
        pairs = list(zip(of_way["mapped"], of_way["memory"], strict=True))
        ratios = [spread([mapped[of] / memory[of] for mapped, memory in pairs]) for of in ("model", "process")]
        allowed = [
            max(1.0, gigabytes * 1e9 / speed / memory["model"])
            for speed, (_, memory) in zip(speeds, pairs, strict=True)
        ]
        seconds = spread([record["model"] for record in of_way["memory"]], 1)
        read = f"{statistics.median(record['read'] for record in of_way['mapped']):.1f}"
        lines.append(f"| {' | '.join([f'{size:,}', seconds, *ratios, read, spread(allowed)])} |")
    return lines


def parse() -> argparse.Namespace:
    """Return the command's arguments, checked."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--limit-gb", type=float, default=0.95, metavar="GB", help="of a mapped process (default: 0.95)"
    )
    parser.add_argument("--tokens", default="2048,4096", metavar="T,T", help="sizes of batches (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=2, metavar="N", help="of each size (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write what is printed to a file")
    arguments = parser.parse_args()
    arguments.sizes = [int(size) for size in arguments.tokens.split(",")]
    return arguments


def main() -> None:
    """Measure, print provenance and table, and write them to a file if asked for."""
    arguments = parse()
    rounds, speeds, sizes = [], [], arguments.sizes
    with tempfile.TemporaryDirectory(prefix="mapped model-", dir=arguments.folder) as name:
        data, run = Path(name) / "data", Path(name) / "run"
        data.mkdir()
        write_data(data, sizes, arguments.batches)
        with Display(1 + arguments.rounds * len(sizes) * len(WAYS)) as display:
            display.begin("the model", 1)
            shards = train(data, run)
            gigabytes = sum(path.stat().st_size for path in shards) / 1e9
            display.end(f"{gigabytes:.2f} GB of experts")
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
    given = f"--limit-gb {arguments.limit_gb} --tokens {arguments.tokens} --batches {arguments.batches} "
    lines = ["# A model in files", ""]
    lines += [f"`python benchmarks/mapped_model.py {given}--rounds {arguments.rounds}`, which defines the columns", ""]
    lines += listed(provenance())
    lines += [f"- threads of a process: {os.environ.get('OMP_NUM_THREADS', 'all cores')}"]
    lines += [f"- experts: {gigabytes:.2f} GB; the mapped processes' memory: {arguments.limit_gb} GB"]
    lines += [f"- the disk's own speed: {spread([speed / 1e6 for speed in speeds], 0)} MB/s"]
    lines += ["- perplexities: the same in both ways", ""]
    lines += table(rounds, speeds, sizes, gigabytes * arguments.batches)
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
