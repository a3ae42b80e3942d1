"""Trainings of several ranks that are killed: forked with all imports done, so that a start takes a second at most.

The ranks run fairseq's trainer and the plugin's saving and loading. Through pipes they tell the process that began them
what they have: ("loaded", update, prints), ("loss", update, sum), ("state", update, prints) before a save, ("saved",
update, operations on files so far), ("resources", update, numbers), ("error", -1, text). A print is a hash of the
weights and moments of an expert, or of all that is dense.
"""

import contextlib
import hashlib
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import recorded
import torch
import torch.distributed as dist
from checkpoint_ranks import state_of
from exactness import arguments as case
from fairseq import checkpoint_utils
from fairseq.data import iterators
from fairseq.logging import metrics
from forked import PRELOADED

CONTEXT = multiprocessing.get_context("fork")
EXPERTS = 12
BATCHES = 4  # of an update, whatever the number of ranks: they divide it
WORLDS = (1, 2, 4)
LIMIT = 300.0  # seconds in which something must happen
WATCHED = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.truncate", "os.listdir", "os.scandir"}
WATCHED |= {"fcntl.lockf"}


@dataclass(frozen=True)
class Plan:
    """What one start of a training does.

    Attributes:
        world_size: ranks.
        updates: the number of updates at which it ends by itself.
        save_every: updates between two saves.
        victim: the rank that ends at a file operation.
        operation: the number of that operation in the folder, from 1; 0: none.
        subset: the split that it trains on.
        rate: the learning rate.
    """

    world_size: int
    updates: int
    save_every: int = 1
    victim: int = 0
    operation: int = 0
    subset: str = "valid"
    rate: float = 1e-3


def prepare() -> None:
    """Import what every start of a training imports late; call it before the first one."""
    torch.set_num_threads(1)
    for name in PRELOADED:
        importlib.import_module(name)


class Ranks:
    """The processes of one start, and what they say."""

    def __init__(self, data: Path, folder: Path, plan: Plan) -> None:
        """Start them; they go on from what is in the folder."""
        self.plan, self.meeting = plan, tempfile.TemporaryDirectory(prefix="meeting ")
        self.processes, self.pipes = [], {}
        for rank in range(plan.world_size):
            receiver, sender = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(target=_train, args=(data, folder, plan, rank, self.meeting.name, sender))
            process.start()
            sender.close()
            self.processes.append(process)
            self.pipes[receiver] = rank

    def messages(self, timeout: float = LIMIT) -> "Iterator[tuple[int, Any]]":
        """Return (rank, message) as they come; (rank, None) for one that has ended. Ends with the last one.

        Raises:
            TimeoutError: none came for so many seconds.
        """
        while self.pipes:
            ready = wait(list(self.pipes), timeout)
            if not ready:
                raise TimeoutError(f"no word for {timeout:.0f} s from ranks {sorted(self.pipes.values())}")
            for pipe in ready:
                try:
                    yield self.pipes[pipe], pipe.recv()
                except (EOFError, OSError):  # a message may be cut by the kill
                    yield self.pipes.pop(pipe), None

    def kill(self, ranks: "Sequence[int] | None" = None) -> None:
        """Kill some ranks, or all of them."""
        for rank in range(self.plan.world_size) if ranks is None else ranks:
            self.processes[rank].kill()

    def end(self) -> list[int]:
        """Kill what is left, and return the exit codes."""
        self.kill()
        for process in self.processes:
            process.join()
        self.meeting.cleanup()
        return [process.exitcode for process in self.processes]


def _train(data: Path, folder: Path, plan: Plan, rank: int, meeting: str, sender: Any) -> None:
    """Be one rank, and end without what Python does at an end: the parent's is not this process's."""
    operations = _count_operations(folder, plan.operation if rank == plan.victim else 0)
    status = 0
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        logging.disable(logging.WARNING)
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{meeting}/store", world_size=plan.world_size, rank=rank
            )
            _train_and_save(data, folder, plan, sender, operations)
            dist.barrier()
        except BaseException as error:  # an exit is one, too
            status = 1
            sender.send(("error", -1, f"{type(error).__name__}: {error}"))
    os._exit(status)


def _train_and_save(data: Path, folder: Path, plan: Plan, sender: Any, operations: Callable[[], int]) -> None:
    options = (*case("hash", EXPERTS, "adam", *SAVING, "--save-dir", str(folder)), "--train-subset", plan.subset)
    options += ("--lr", str(plan.rate))
    trainer, epoch_itr = recorded.make_trainer(data, (*options, "--update-freq", str(BATCHES // plan.world_size)))
    sender.send(("loaded", trainer.get_num_updates(), prints(trainer)))
    record = recorded.keep_losses_and_norms(trainer)
    for update in _updates(trainer, epoch_itr, plan.updates):
        sender.send(("loss", update, record["loss"][-1]))
        if update % plan.save_every == 0:
            sender.send(("state", update, prints(trainer)))
            checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, None)
            sender.send(("saved", update, operations()))
            sender.send(("resources", update, resources()))


SAVING = ("--save-interval-updates", "1", "--keep-interval-updates", "2", "--no-epoch-checkpoints")


def _updates(trainer: Any, epoch_itr: Any, updates: int) -> Iterator[int]:
    """Train to a number of updates, and say each."""
    frequency = trainer.cfg.optimization.update_freq[0]
    with metrics.aggregate("train"):
        while trainer.get_num_updates() < updates:
            for samples in iterators.GroupedIterator(epoch_itr.next_epoch_itr(), frequency):
                trainer.train_step(samples)
                yield trainer.get_num_updates()
                if trainer.get_num_updates() >= updates:
                    return


def _count_operations(folder: Path, last: int) -> Callable[[], int]:
    """Count what this process does to files in a folder, and kill it before operation `last`; return the counter."""
    count, name = 0, str(folder)

    def seen(event: str, given: tuple[Any, ...]) -> None:
        nonlocal count
        if event in WATCHED and (event == "fcntl.lockf" or str(given[0]).startswith(name)):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(seen)
    return lambda: count


def prints(trainer: Any) -> dict[str, str]:
    """Return hashes of weights and moments: one of each expert of this rank, one of all that is dense."""
    held = recorded.held_by(trainer.get_model())["experts"]
    hashes = {"dense": hashlib.sha256(), **{f"expert {expert}": hashlib.sha256() for expert in held}}
    moments = trainer.optimizer.optimizer.state
    named = trainer.get_model().named_parameters()
    state = state_of(trainer) if moments else {name: parameter.detach() for name, parameter in named}
    for name, tensor in sorted(state.items()):
        if ".experts." in name:
            for row, expert in zip(tensor, held, strict=True):
                hashes[f"expert {expert}"].update(name.encode() + row.contiguous().numpy().tobytes())
        else:
            hashes["dense"].update(name.encode() + tensor.numpy().tobytes())
    return {name: value.hexdigest()[:16] for name, value in hashes.items()}


def resources() -> dict[str, int]:
    """Return this process's own memory in bytes, its threads and its open files."""
    with open("/proc/self/status") as status:
        facts = dict(line.split(":", 1) for line in status)
    files = len(os.listdir("/proc/self/fd"))
    return {"memory": int(facts["RssAnon"].split()[0]) * 1024, "threads": int(facts["Threads"]), "files": files}
