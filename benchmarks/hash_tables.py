#!/usr/bin/env python3
"""Hash tables: seconds and memory of each builder for a large dictionary, and the lookup compared with an embedding's.

    python benchmarks/hash_tables.py [--symbols V] [--experts E] [--columns K] [--tokens N] [--repeats R] [--out FILE]

The text is N tokens drawn by Zipf's law (the frequency of rank r is in proportion to 1 / (r + 2.7)), independently of
each other. E clusters are drawn uniformly. Each builder runs in a process of its own:

- `s`: the time to build the table from counts in memory, the median of R processes; for `best of 4` a quarter of it,
  that is, one restart.
- `MB` (10^6 bytes): the largest resident memory of the process, libraries and inputs included (`nothing`: these alone,
  without the text). `count_pairs` and `spread` hold the whole text or its pairs.
- `largest / mean`: the largest load divided by the mean. `bound`: its lower bound with these rows (`lower_bound`); for
  `spread`, with these pairs on top of the other tokens' loads (`filling_bound`).

The lookups take 8 x 1024 tokens, on one thread, by a model's modules: from rows to experts and, for a spread table, the
rows, too. Ratios are to `torch.nn.Embedding` of float32 `[V, K]`, which has half the bytes of a table's int64; one of
float64 has as many bytes. The calls run in turn; times are medians of 200.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fairseq_hash import hashing
from fairseq_hash.hashing.balance import judge
from fairseq_hash.hashing.builders import (
    balanced_experts,
    best_of,
    modulo_experts,
    random_experts,
    round_robin_experts,
    scattered_experts,
)
from fairseq_hash.hashing.clusters import dispersed_experts
from fairseq_hash.hashing.spread import count_pairs, heavy_tokens, spread_table
from fairseq_hash.provenance import listed, provenance

PADDING = 1
BUILDERS = ("nothing", "random", "modulo", "round-robin", "balanced", "balanced with a seed", "best of 4")
BUILDERS += ("scattered", "dispersed")
OF_PAIRS = ("count_pairs", "spread")


def draw_text(symbols: int, tokens: int, experts: int, columns: int, folder: Path) -> None:
    """Write a text, its counts and its pairs as NumPy files."""
    generator = np.random.default_rng(0)
    share = np.cumsum(1 / (np.arange(symbols) + 2.7))
    text = np.searchsorted(share, generator.random(tokens) * share[-1])
    counts = np.bincount(text, minlength=symbols)
    pair, count = count_pairs(text, heavy_tokens(counts, experts, columns), PADDING)
    for name, array in (("text", text), ("counts", counts), ("pair", pair), ("pair_count", count)):
        np.save(folder / f"{name}.npy", array)


def in_this_process(
    name: str, symbols: int, tokens: int, experts: int, columns: int, folder: Path
) -> dict[str, object]:
    """Do one thing; for a builder return seconds, peak memory and balance."""
    if name == "text":
        draw_text(symbols, tokens, experts, columns, folder)
        return {}
    if name == "lookups":
        return lookups(experts, columns, folder)
    counts = np.load(folder / "counts.npy")
    if name == "spread":
        base = balanced_experts(counts, experts, columns)
        base = hashing.HashTable(base, hashing.TableRecord("balanced", experts, ""))
        pairs = tuple(np.load(folder / f"{part}.npy") for part in ("pair", "pair_count"))
    text = np.load(folder / "text.npy") if name == "count_pairs" else None
    heavy = heavy_tokens(counts, experts, columns)
    clusters = random_experts(symbols, experts, seed=7).flatten()

    def balanced(number: int) -> np.ndarray:
        return balanced_experts(counts, experts, columns, number or None)

    calls: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "random": lambda: random_experts(symbols, experts, columns),
        "modulo": lambda: modulo_experts(symbols, experts, columns),
        "round-robin": lambda: round_robin_experts(symbols, experts, columns),
        "balanced": lambda: balanced(0),
        "balanced with a seed": lambda: balanced(1),
        "best of 4": lambda: best_of(4, balanced, counts, experts)[0],
        "scattered": lambda: scattered_experts(counts, experts, columns),
        "dispersed": lambda: dispersed_experts(clusters, counts, experts, columns),
        "count_pairs": lambda: count_pairs(text, heavy, PADDING),
        "spread": lambda: spread_table(base, counts, pairs),
    }
    start = time.perf_counter()
    built = calls[name]()
    seconds = (time.perf_counter() - start) / (4 if name == "best of 4" else 1)
    unit = 1 if sys.platform == "darwin" else 1024
    result = {"s": seconds, "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6}
    if isinstance(built, hashing.HashTable):
        settings = built.record.settings
        result |= {"largest": settings["largest_over_mean"], "bound": settings["bound_over_mean"], **settings}
    elif isinstance(built, np.ndarray):
        balance = judge(built, counts, experts)
        result |= {"largest": balance.largest_over_mean, "bound": balance.bound_over_mean}
    return result


def in_a_process(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Return the result of one thing in a fresh process, because a forked child begins with the peak memory of its
    parent.
    """
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
    command += [f"--{option}={getattr(arguments, option)}" for option in ("symbols", "tokens", "experts", "columns")]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def lookups(experts: int, columns: int, folder: Path) -> dict[str, float]:
    """Return the milliseconds of each lookup."""
    torch.set_num_threads(1)
    counts, text = np.load(folder / "counts.npy"), np.load(folder / "text.npy", mmap_mode="r")
    record = hashing.TableRecord("balanced", experts, "00" * 32)
    base = hashing.HashTable(balanced_experts(counts, experts, columns), record)
    pairs = tuple(np.load(folder / f"{part}.npy") for part in ("pair", "pair_count"))
    spread = spread_table(base, counts, pairs)
    # Here, because it imports fairseq, and builders are measured without it.
    from fairseq_hash.lm.table_buffers import TableBuffers

    embedding = torch.nn.Embedding(len(counts), columns).requires_grad_(False)
    wide = torch.nn.Embedding(len(counts), columns, dtype=torch.float64).requires_grad_(False)
    table, spread = TableBuffers(base), TableBuffers(spread)
    token_BL = torch.from_numpy(text[: 8 * 1024].astype(np.int64)).view(8, 1024)
    token_T = token_BL.flatten()
    calls = {
        "embedding": lambda: embedding(token_T),
        "embedding of float64": lambda: wide(token_T),
        "table": lambda: table(token_T),
        "spread table": lambda: spread(spread.rows(token_BL, PADDING, None).flatten()),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(220):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(all_times[20:]) for name, all_times in times.items()}


def lines(arguments: argparse.Namespace, folder: Path) -> "list[str]":
    """Measure everything and return the lines of the report."""
    in_a_process("text", arguments, folder)
    report = ["# Hash tables", ""]
    report += [
        f"`python benchmarks/hash_tables.py`: {arguments.symbols:,} symbols, {arguments.experts} experts, "
        f"{arguments.columns} experts a token, {arguments.tokens:,} tokens; medians of {arguments.repeats} processes.",
        "",
    ]
    report += listed(provenance())
    report += ["", "| builder | s | MB | largest / mean | bound |", "|---|---|---|---|---|"]
    for name in (*BUILDERS, *OF_PAIRS):
        runs = [in_a_process(name, arguments, folder) for _ in range(arguments.repeats)]
        result = {**runs[0], **{unit: statistics.median(run[unit] for run in runs) for unit in ("s", "MB")}}
        balance = [f"{result[key]:.4f}" if key in result else "" for key in ("largest", "bound")]
        report.append(f"| {name} | {result['s']:.2f} | {result['MB']:.0f} | {' | '.join(balance)} |")
    report += [
        "",
        f"The spread table has {result['heavy_tokens']} heavy tokens and {result['pairs']:,} pairs as rows, ",
    ]
    report[-1] += f"{result['pairs_left_out']:,} rarer pairs are left out."
    report += ["", "| lookup | ms | over embedding |", "|---|---|---|"]
    times = in_a_process("lookups", arguments, folder)
    return report + [f"| {name} | {t:.3f} | {t / times['embedding']:.2f} |" for name, t in times.items()]


def main() -> None:
    """Measure and print a report, and write it to a file if asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--symbols", type=int, default=267_735, metavar="V", help="default: %(default)s, WikiText-103's"
    )
    parser.add_argument("--experts", type=int, default=1024, metavar="E", help="default: %(default)s")
    parser.add_argument("--columns", type=int, default=8, metavar="K", help="experts a token (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2**25, metavar="N", help="of the text (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="R", help="processes a builder (default: %(default)s)"
    )
    parser.add_argument("--out", metavar="FILE", help="also write the report to a file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        shape = arguments.symbols, arguments.tokens, arguments.experts, arguments.columns
        print(json.dumps(in_this_process(arguments.child, *shape, arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        report = "\n".join(lines(arguments, Path(folder))) + "\n"
    print(report, end="")
    if arguments.out:
        Path(arguments.out).write_text(report)


if __name__ == "__main__":
    main()
