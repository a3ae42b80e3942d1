#!/usr/bin/env python3
"""Fuzzing: what every reader of files does with mutated ones, thousands for each reader.

    python benchmarks/fuzz.py [--inputs N] [--reader NAME ...] [--seed N] [--out FILE]

A mutated file may be accepted, or refused by a `UserError` in one line. All else is a fault: another error, a message
that is not one printable line, more than 5 seconds of a core, a demand for more than 1 GiB of memory, a command or a
connection that is begun. The valid files, the mutations and the readers are those of tests/fuzz, which gives a short
dose.

Each reader runs in a process of its own; slow readers get a share of the inputs (`share` in tests/fuzz). `slowest` is
the longest reading of an input, mutation included, in time of a core; `peak` is the largest resident memory above that
of the process before its first reading (10^6 bytes).

An input is the same in every run by reader, seed and number. To see one fault again:

    python benchmarks/fuzz.py --reader "training log" --first 1234 --inputs 1
"""

import argparse
import logging
import math
import sys
import tempfile
import warnings
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
for folder in ("tests/support", "tests/fuzz"):
    sys.path.insert(0, str(ROOT / folder))
sys.path.insert(0, str(ROOT))

from fuzz_readers import READERS  # noqa: E402
from fuzz_rounds import Round, play  # noqa: E402
from rounds import reset_peak, resident  # noqa: E402

from fairseq_hash.core.files import atomic_write  # noqa: E402
from fairseq_hash.provenance import listed, provenance  # noqa: E402

LINES = 10  # of progress for each reader


def in_this_process(name: str, arguments: argparse.Namespace, connection: Connection) -> None:
    """Fuzz one reader, and send what came of it."""
    reader = READERS[name]
    inputs = math.ceil(arguments.inputs * reader.share)
    every = max(1, inputs // LINES)

    def tell(result: Round) -> None:
        if result.inputs % every == 0:
            text = f"  {result.inputs:,} of {inputs:,}: {result.refused:,} refused, {result.faulty:,} faults"
            print(text, file=sys.stderr, flush=True)

    list(reader.seeds())  # so that what makes valid files is not counted
    is_measured, before = reset_peak(), resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        result = play(reader, Path(folder), arguments.inputs, arguments.seed, tell, arguments.first)
    result.peak_bytes = max(0, resident("VmHWM") - before) if is_measured else None
    connection.send(asdict(result))


def fuzz(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Fuzz one reader in a process of its own, a copy of this one; one that dies is a fault."""
    print(f"{name}:", file=sys.stderr, flush=True)
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=in_this_process, args=(name, arguments, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        child.join()
        fault = {"what": f"the process ended with status {child.exitcode}", "first": -1, "trace": "", "times": 1}
        result: dict[str, Any] = dict.fromkeys(("inputs", "accepted", "refused", "slowest_ms"), 0)
        return result | {"reader": name, "faults": {"": fault}, "peak_bytes": None}
    finally:
        child.join()


def report_of(results: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """Return the report in Markdown."""
    words = f"`python benchmarks/fuzz.py --inputs {arguments.inputs} --seed {arguments.seed}`"
    lines = ["# Fuzzing of readers", "", f"{words}: mutated files for each reader of files.", ""]
    lines += listed(provenance())
    lines += [
        "",
        "| reader | inputs | accepted | refused | faults | slowest, ms | peak, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        counts = " | ".join(f"{result[key]:,}" for key in ("inputs", "accepted", "refused"))
        faulty = sum(fault["times"] for fault in result["faults"].values())
        peak = "not measured" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 1e6:,.0f}"
        lines.append(f"| {result['reader']} | {counts} | {faulty:,} | {result['slowest_ms']:,.0f} | {peak} |")
    lines += [
        "",
        "Accepted: the mutation left a file that says something sound, or is never read. Refused: by one line. Faults: "
        "all else. The slowest reading is in time of a core.",
    ]
    for result in results:
        for fault in result["faults"].values():
            lines += [
                "",
                f"- {result['reader']}, {fault['times']} times, first input {fault['first']}: {fault['what']}",
            ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Fuzz readers, print a report, and write it to a file if asked for; return 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--inputs", type=int, default=10_000, metavar="N", help="for each reader (default: %(default)s)")
    add("--reader", action="append", metavar="NAME", help="one reader, or several by several options (default: all)")
    add("--seed", type=int, default=1, metavar="N", help="of the mutations (default: %(default)s)")
    add("--first", type=int, default=0, metavar="N", help="number of the first input (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="also write the report to a file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    names = arguments.reader or list(READERS)
    if unknown := [name for name in names if name not in READERS]:
        parser.error(f"there is no reader {unknown[0]}; there are {', '.join(READERS)}")
    results = []
    for name in names:
        results.append(fuzz(name, arguments))
        if arguments.out:  # after each reader: all of them take long
            with atomic_write(arguments.out) as partial:
                partial.write_text(report_of(results, arguments), encoding="utf-8")
    print(report_of(results, arguments), end="")
    for result in results:
        for fault in result["faults"].values():
            print(f"\n{result['reader']}, input {fault['first']}: {fault['what']}\n{fault['trace']}", file=sys.stderr)
    return int(any(result["faults"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
