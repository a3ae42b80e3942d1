"""Trainings of one rank with a process group, which stop, go on, and are compared with one that has no group."""

import shutil
import socket
from dataclasses import dataclass

from gpu.trainings import HASH, Several, assert_same_losses, finish, numbers, train

SAVED, UPDATES = 6, 10


@dataclass
class Case:
    """Options of a training, what is forced on it, how far (in bits) its losses may be from fp32's, and its model."""

    options: tuple
    forced: tuple = ("wrapped",)
    tolerance: float = 1e-3
    model: tuple = HASH


def group_of_one():
    """Return the environment in which fairseq makes a process group of one rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}


def backend(device):
    """Return the option that names the process group's backend."""
    return ("--distributed-backend", "nccl" if device.type == "cuda" else "gloo")


def alone_name(model):
    """Return the name of a model's training without a group."""
    return " ".join(model)


def stop_and_go_on(data, device, folder, cases, more=()):
    """Return three processes: each model without a group, all cases to where they save, and on from there."""
    jobs = {}
    for name, case in cases.items():
        words = (*backend(device), *case.model, *case.options)
        jobs[name] = train(data, device, folder / name, SAVED, *words, forced=(*case.forced, *more))
    alone = {
        alone_name(model): train(data, device, folder / "alone", UPDATES, "--no-save", *model)
        for model in {case.model for case in cases.values()}
    }
    first = Several(device, folder / "said first", jobs, **group_of_one())
    alone = Several(device, folder / "said alone", alone)
    finish(first, alone)
    for name, job in jobs.items():
        if (folder / name).exists():
            shutil.copytree(folder / name, folder / f"{name}, on")
        job.words[job.words.index(str(folder / name))] = str(folder / f"{name}, on")
        job.words += ["--max-update", str(UPDATES)]
    then = Several(device, folder / "said then", jobs, **group_of_one())
    finish(then)
    return alone, first, then


def assert_as_without_a_group(processes, name, case):
    """Compare a case with the reference, before and after it stopped."""
    alone, first, then = processes
    before, after = numbers(first.said(name)), numbers(then.said(name))
    assert list(before) == list(range(1, SAVED + 1)) and list(after) == list(range(SAVED + 1, UPDATES + 1))
    assert_same_losses({**before, **after}, numbers(alone.said(alone_name(case.model))), case.tolerance)
