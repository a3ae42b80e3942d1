#!/usr/bin/env python3
"""Soak: a long training that is killed again and again has the losses of one that never was; nothing grows.

    python benchmarks/soak.py [--updates N] [--seed N] [--out FILE]

A small model with 12 experts trains on two processes (gloo) with fairseq's trainer, and saves every 50 updates. One
training never stops. The other is killed with SIGKILL, all ranks at once, 1 to 49 updates after every 200th, and goes
on from its checkpoint on 1, 4 or 2 ranks in turn, with the same batches in an update (ranks x `--update-freq` is 4). So
it does some updates twice. The loss of every update, and of every repetition, is compared with that of the training
which never stopped. After each save of the latter, each rank notes its own memory (`RssAnon`), its threads and its open
files; they are flat if the last third of the saves has no more of threads and files than the others had, and if memory
grows by less than 5 x 10^6 bytes for 1,000 updates.

On another number of ranks the same sums are added up in another order. A training makes such a difference larger as it
goes on, the faster the larger its learning rate is. At a rate of 1e-3 it was 0.034 within 3,000 updates, and 0.022
between two trainings that were never killed, on one rank and on two. So the rate is 1e-4 here.
"""

import argparse
import itertools
import logging
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT)]

import killed_trainings  # noqa: E402
from killed_trainings import Plan, Ranks  # noqa: E402
from made_corpus import make_corpus  # noqa: E402

from fairseq_hash.core.files import atomic_write  # noqa: E402
from fairseq_hash.provenance import listed, provenance  # noqa: E402

SAVE_EVERY, KILL_EVERY = 50, 200
WORLDS = (2, 1, 4)  # in turn
RATE = 1e-4  # of learning
TOLERANCE = 1e-4  # of a loss, relative: the same sums in another order, over thousands of updates
WINDOW = 500  # updates for which the largest difference is shown
GROWTH = 5e6  # bytes for 1,000 updates; above it memory is not called flat


def train(data: Path, folder: Path, plan: Plan, stop_at: int) -> "Iterator[tuple[str, int, Any]]":
    """Train until an update, and kill all ranks there, or to the plan's end; return what rank 0 and others say.

    Raises:
        RuntimeError: a rank has failed.
    """
    ranks = Ranks(data, folder, plan)
    killed = False
    for rank, message in ranks.messages():
        if message is None or killed:
            continue
        if message[0] == "error":
            raise RuntimeError(f"rank {rank}: {message[2]}")
        yield message if message[0] != "resources" else ("resources", message[1], {"rank": rank, **message[2]})
        if message[0] == "loss" and rank == 0 and message[1] == stop_at:
            ranks.kill()
            killed = True
    ranks.end()


def undisturbed(data: Path, folder: Path, updates: int) -> "tuple[dict[int, float], pd.DataFrame]":
    """Return the losses by update, and the resources of each rank after each save."""
    losses, used = {}, []
    for what, update, about in train(data, folder, Plan(2, updates, SAVE_EVERY, subset="train", rate=RATE), -1):
        if what == "loss":
            losses[update] = about
            tell(f"never killed: {update:,} of {updates:,} updates", update)
        elif what == "resources":
            used.append({"update": update, **about})
    return losses, pd.DataFrame(used)


def disturbed(data: Path, folder: Path, updates: int, seed: int) -> "tuple[list[tuple[int, float]], list[int]]":
    """Return (update, loss) of all starts, and the updates at which all were killed."""
    draw, losses, kills = random.Random(seed), [], []
    ends = [at + draw.randint(1, SAVE_EVERY - 1) for at in range(KILL_EVERY, updates, KILL_EVERY)] + [updates]
    for end, world_size in zip(ends, itertools.cycle(WORLDS)):
        start = None
        plan = Plan(world_size, min(end + 1, updates), SAVE_EVERY, subset="train", rate=RATE)
        for what, update, about in train(data, folder, plan, end if end < updates else -1):
            if what == "loaded" and start is None:
                start = update
                if kills and start != kills[-1] // SAVE_EVERY * SAVE_EVERY:
                    raise RuntimeError(f"killed at update {kills[-1]}, and went on from {start}")
            elif what == "loss" and (not losses or losses[-1] != (update, about)):
                losses.append((update, about))
                tell(f"killed: {update:,} of {updates:,} updates on {world_size} ranks", update)
        if end < updates:
            kills.append(end)
    return losses, kills


def tell(text: str, update: int) -> None:
    """Say how far it is, now and then."""
    if update % (10 * SAVE_EVERY) == 0:
        print(text, file=sys.stderr, flush=True)


def flatness(used: pd.DataFrame) -> tuple[dict[str, str], bool]:
    """Return lines on what each rank has used, and whether that is flat."""
    rows, is_flat = {}, True
    for rank, of_rank in used.groupby("rank"):
        third = len(of_rank) // 3
        earlier, last = of_rank.iloc[:-third], of_rank.iloc[-third:]
        first = of_rank.iloc[third // 2 : third // 2 + third]  # the first saves make what is made once
        grown = last.mean() - first.mean()
        rate = grown["memory"] / (grown["update"] / 1000)
        rows[f"rank {rank}: own memory at the end, 10^6 bytes"] = f"{of_rank['memory'].iloc[-1] / 1e6:.1f}"
        rows[f"rank {rank}: its growth for 1,000 updates"] = f"{rate / 1e6:+.2f} (allowed: {GROWTH / 1e6:.0f})"
        is_flat &= bool(rate <= GROWTH)
        for kind in ("threads", "files"):
            rows[f"rank {rank}: {kind}"] = f"{of_rank[kind].min()} to {of_rank[kind].max()}, last {last[kind].max()}"
            is_flat &= bool(last[kind].max() <= earlier[kind].max())
    return rows, is_flat


def main() -> int:
    """Run both trainings, print a report, and write it to a file if asked for; return 1 if they differ or grow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--updates", type=int, default=3000, metavar="N", help="of each training, 300 or more (default: %(default)s)")
    add("--seed", type=int, default=1, metavar="N", help="of the moments of kills (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="also write the report to a file")
    arguments = parser.parse_args()
    if arguments.updates < 300:
        parser.error(f"--updates {arguments.updates} is too few to see a kill and a growth; give 300 or more")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    killed_trainings.prepare()
    with tempfile.TemporaryDirectory(prefix="soak ") as name:
        data = make_corpus(Path(name))
        expected, used = undisturbed(data, Path(name, "whole"), arguments.updates)
        losses, kills = disturbed(data, Path(name, "killed"), arguments.updates, arguments.seed)
    differences = pd.Series({place: abs(loss / expected[update] - 1) for place, (update, loss) in enumerate(losses)})
    windows = pd.Series([(update - 1) // WINDOW for update, _ in losses])
    difference = differences.max()
    missing = len(expected) - len({update for update, _ in losses})
    rows = {
        "updates": f"{len(expected):,}",
        "kills of all ranks": f"{len(kills)}",
        "losses compared": f"{len(losses):,}",
        "of them of updates done twice": f"{len(losses) - len(expected) + missing:,}",
        "updates without a loss": f"{missing}",
        "largest relative difference of a loss": f"{difference:.1e} (allowed: {TOLERANCE:.0e})",
    }
    for window, largest in differences.groupby(windows).max().items():
        rows[f"of updates {window * WINDOW + 1:,} to {(window + 1) * WINDOW:,}"] = f"{largest:.1e}"
    lines_of_use, is_flat = flatness(used)
    rows |= lines_of_use
    words = f"`python benchmarks/soak.py --updates {arguments.updates} --seed {arguments.seed}`"
    lines = ["# Soak", "", words, ""]
    lines += listed(provenance())
    lines += ["", "| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows.items())]
    report = "\n".join([*lines, "", *(" ".join(part.split()) + "\n" for part in __doc__.split("\n\n")[2:])])
    if arguments.out:
        with atomic_write(arguments.out) as partial:
            partial.write_text(report, encoding="utf-8")
    print(report, end="")
    return int(missing > 0 or difference > TOLERANCE or not is_flat)


if __name__ == "__main__":
    sys.exit(main())
