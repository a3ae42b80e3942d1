#!/usr/bin/env python3
"""Kills around saving: a training is killed again and again, and what it leaves must be whole.

    python benchmarks/kills.py [--kills N] [--seed N] [--out FILE]

A small model with 12 experts trains on 1, 2 or 4 processes (gloo) with fairseq's trainer and saves after every update.
Each start is killed with SIGKILL, one rank first and the others at once or up to 0.15 s later: half of the kills before
an operation on a file in the checkpoints' folder, chosen at random among all since the start (lock, cleaning, loading,
shards, main file, links, removal), half at a random moment after a save has begun. After each kill every main file is
verified with its shards, and no save that had ended may be gone; the next start, on a random number of ranks, must load
the weights and moments of that update to the bit, and must have removed what an unfinished save had left
(tests/support/kill_rounds.py).

A kill of a process loses nothing that the kernel has taken. So this says nothing about a machine that loses its power.
"""

import argparse
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT)]

import killed_trainings  # noqa: E402
from kill_rounds import KillRounds, Tally  # noqa: E402
from made_corpus import make_corpus  # noqa: E402

from fairseq_hash.core.files import atomic_write  # noqa: E402
from fairseq_hash.provenance import listed, provenance  # noqa: E402

LINES = 20  # of progress
ENOUGH = 20  # faults, after which no more kills are tried


def report_of(tally: Tally, arguments: argparse.Namespace) -> str:
    """Return the report in Markdown."""
    lines = [
        "# Kills around saving",
        "",
        f"`python benchmarks/kills.py --kills {arguments.kills} --seed {arguments.seed}`",
    ]
    lines += ["", *listed(provenance())]
    counts = {
        "kills": sum(tally.kills.values()),
        **{f"of them {kind}": number for kind, number in sorted(tally.kills.items())},
        "starts that ended before their kill": tally.starts - sum(tally.kills.values()),
        "kills that left files of an unfinished save": tally.interrupted,
        "saves that had ended": tally.saves,
        "loads compared to the bit": tally.loads,
        "saves lost": tally.lost,
        "faults of any kind": len(tally.faults),
    }
    lines += ["", "| | number |", "|---|---:|", *(f"| {name} | {number:,} |" for name, number in counts.items())]
    lines += ["", " ".join(__doc__.split("\n\n")[2].split()), "", " ".join(__doc__.split("\n\n")[3].split())]
    return "\n".join([*lines, *(f"\n- {fault}" for fault in tally.faults)]) + "\n"


def main() -> int:
    """Kill trainings, print a report, and write it to a file if asked for; return 1 if something was lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--kills", type=int, default=1000, metavar="N", help="(default: %(default)s)")
    add("--seed", type=int, default=1, metavar="N", help="of moments and ranks (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="also write the report to a file")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    killed_trainings.prepare()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills ") as name:
        rounds = KillRounds(make_corpus(Path(name)), Path(name, "saved"), arguments.seed)
        tally = rounds.tally
        while (kills := sum(tally.kills.values())) < arguments.kills and len(tally.faults) < ENOUGH:
            if rounds.kill_one() and (kills + 1) % max(1, arguments.kills // LINES) == 0:
                left = (time.monotonic() - begin) / (kills + 1) * (arguments.kills - kills - 1) / 60
                said = f"{kills + 1:,} kills, update {rounds.saved}, {tally.lost} lost, {len(tally.faults)} faults"
                print(f"{said}, about {left:.0f} min left", file=sys.stderr, flush=True)
    report = report_of(tally, arguments)
    if arguments.out:
        with atomic_write(arguments.out) as partial:
            partial.write_text(report, encoding="utf-8")
    print(report, end="")
    return int(bool(tally.faults))


if __name__ == "__main__":
    sys.exit(main())
