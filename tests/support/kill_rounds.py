"""Rounds of kills around saving: each start of a training is killed, and what it leaves is looked at.

A training of 1, 2 or 4 ranks saves after every update. It is killed before one of its operations on files, chosen at
random among all from its start (the lock, what is cleaned up, what is loaded, shards, main file, links, what is
removed), or some time after it has begun to save. One rank is killed, and the others some time later or at once.
Then, of what is in the folder:

- every main file is whole, with its shards, by their checksums;
- no save is lost that had ended: `checkpoint_last.pt` is at least as new;
- the next start loads the weights and moments that the training had at that update, to the bit, on any number of ranks;
- what an unfinished save had left is gone when the next start has loaded.
"""

import contextlib
import io
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from killed_trainings import WORLDS, Plan, Ranks
from saved_checkpoints import referenced

from fairseq_hash.cli import main as command

SAVES = 3  # of a start that nothing kills
LONGEST = 0.15  # seconds from the beginning of a save to a kill, and from one rank's to the others'


@dataclass
class Tally:
    """What came of some kills.

    Attributes:
        kills: by kind and number of ranks.
        starts: those that ended by themselves, before their kill, included.
        saves: that had ended.
        interrupted: kills that left files of an unfinished save.
        loads: starts that went on from a checkpoint, whose weights and moments were compared.
        lost: saves that had ended and were gone.
        faults: what else was wrong, a line each.
    """

    kills: Counter = field(default_factory=Counter)
    starts: int = 0
    saves: int = 0
    interrupted: int = 0
    loads: int = 0
    lost: int = 0
    faults: list[str] = field(default_factory=list)


class KillRounds:
    """Trainings in one folder that go on from each other, each of them killed."""

    def __init__(self, data: Path, folder: Path, seed: int) -> None:
        """Take binarized data and a folder for the checkpoints."""
        self.data, self.folder, self.random = data, folder, random.Random(seed)
        self.tally = Tally()
        self.saved = 0  # the newest update whose save had ended
        self.states: dict[int, list[dict[str, str]]] = {}  # what the training was at an update, in each start
        self.left: set[str] = set()  # files of an unfinished save
        self.most = {True: 40, False: 15}  # operations on files in a start: of rank 0, of others

    def kill_one(self) -> bool:
        """Start a training, kill it, and look; return whether it was killed before its end."""
        draw = self.random
        world = draw.choice(WORLDS)
        victim = draw.randrange(world)
        by_operation = draw.random() < 0.5
        operation = draw.randint(1, self.most[victim == 0]) if by_operation else 0
        saves = draw.randint(1, SAVES)
        pauses = draw.uniform(0, LONGEST), draw.choice((0.0, draw.uniform(0, LONGEST)))

        self.tally.starts += 1
        start = _Start(self, Plan(world, newest(self.folder) + SAVES, victim=victim, operation=operation))
        killed = start.run(None if by_operation else saves, *pauses)
        if killed:
            self.tally.kills[f"{'at an operation' if by_operation else 'at a moment'}, {world} ranks"] += 1
        self.look()
        return killed

    def look(self) -> None:
        """Check what is in the folder."""
        mains = sorted(self.folder.glob("*.pt"))
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
            if mains and command(["checkpoint", "verify", *map(str, mains)]):
                self.fault(f"damaged: {said.getvalue()}")
        if (found := newest(self.folder)) < self.saved:
            self.tally.lost += self.saved - found
            self.fault(f"update {self.saved} was saved, and {found} is the newest")
        self.saved = found
        self.left = leftovers(self.folder)
        self.tally.interrupted += bool(self.left)

    def fault(self, what: str) -> None:
        """Note what is wrong."""
        self.tally.faults.append(f"start {self.tally.starts}: {what}")


class _Start:
    """One start of the training."""

    def __init__(self, rounds: KillRounds, plan: Plan) -> None:
        self.rounds, self.plan = rounds, plan
        self.heard: dict[tuple[str, int], dict[int, dict[str, str]]] = {}
        self.errors: list[str] = []

    def run(self, saves: "int | None", pause: float, others_pause: float) -> bool:
        """Kill it `pause` seconds after it has begun so many saves, or when the victim has killed itself."""
        plan = self.plan
        ranks = Ranks(self.rounds.data, self.rounds.folder, plan)
        killed = False
        try:
            for rank, message in ranks.messages():
                if message is None and plan.operation and not killed:
                    ranks.processes[plan.victim].join(1.0)
                    killed = ranks.processes[plan.victim].exitcode == -9
                    if killed:
                        time.sleep(others_pause)
                        ranks.kill()
                elif message is not None:
                    self.hear(rank, message)
                    if message[0] == "state" and rank == 0 and saves is not None:
                        saves -= 1
                        if saves == 0:
                            time.sleep(pause)
                            ranks.kill([plan.victim])
                            time.sleep(others_pause)
                            ranks.kill()
                            killed = True
        except TimeoutError as error:
            self.rounds.fault(str(error))
        codes = ranks.end()
        if not killed and any(codes):
            self.rounds.fault(f"{plan} ended by itself with {codes}: {' '.join(self.errors)}")
        return killed

    def hear(self, rank: int, message: tuple[str, int, Any]) -> None:
        """Take what a rank says."""
        what, update, about = message
        rounds = self.rounds
        if what == "error":
            self.errors.append(f"rank {rank}: {about}")
        elif what == "saved":
            rounds.tally.saves += update > rounds.saved
            rounds.saved = max(rounds.saved, update)
            is_first = rank == 0
            rounds.most[is_first] = max(rounds.most[is_first], about)
        elif what in ("loaded", "state"):
            of_ranks = self.heard.setdefault((what, update), {})
            of_ranks[rank] = about
            if len(of_ranks) == self.plan.world_size:
                whole = {name: value for prints in of_ranks.values() for name, value in prints.items()}
                if any(prints["dense"] != whole["dense"] for prints in of_ranks.values()):
                    rounds.fault(f"ranks differ at update {update}")
                (self.loaded if what == "loaded" else self.reached)(update, whole)

    def reached(self, update: int, whole: dict[str, str]) -> None:
        """Note what the training is at an update."""
        self.rounds.states.setdefault(update, []).append(whole)

    def loaded(self, update: int, whole: dict[str, str]) -> None:
        """Check what a start has loaded."""
        rounds = self.rounds
        if update < rounds.saved:
            rounds.fault(f"update {rounds.saved} was saved, and a start went on from {update}")
        if update and whole not in rounds.states[update]:
            rounds.fault(f"loaded at update {update} is not what was saved")
        rounds.tally.loads += bool(update)
        if old := {path.name for path in rounds.folder.rglob("*")} & rounds.left:
            rounds.fault(f"left over after a start: {', '.join(sorted(old))}")


def newest(folder: Path) -> int:
    """Return the update that the next start goes on from; 0 where there is none."""
    last = folder / "checkpoint_last.pt"
    return torch.load(last, weights_only=True)["fairseq_hash"]["update"] if last.is_file() else 0


def leftovers(folder: Path) -> set[str]:
    """Return the names of the files that belong to no checkpoint."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    kept = referenced(folder)
    return {
        path.name
        for path in files
        if path.name.endswith(".partial") or (path.suffix == ".safetensors" and path.name not in kept)
    }
