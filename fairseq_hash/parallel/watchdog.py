"""Ends a job whose ranks wait for each other when one of them fails: soon, and with one line that names it.

Every rank says every second, in the store of the process group, that it is alive; rank 0 listens to all, all listen to
rank 0. The first rank that knows of a failure says so there, and prints the cause; all others leave without a word. A
rank that cannot say anything any more (killed, lost machine) is noticed by those whose exchange with it breaks, within
`BROKEN` seconds, or for its silence, within `SILENCE` seconds. A thread speaks for the rank: a slow update is no
failure.

Rank 0 keeps the store, unless a launcher does. Where it goes, or no longer answers, nobody can agree on who speaks:
one rank of each machine does.
"""

import atexit
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist

INTERVAL = 1.0
BROKEN = 10.0
SILENCE = 60.0
# Launchers blame the rank that they see end first: the others give it this much time.
PRECEDENCE = 4.0
FAILURE = "fairseq_hash/failure"
GONE = "ended without a word (killed, or its machine is gone)"


def is_broken_exchange(error: BaseException) -> bool:
    """Return whether an error says that the exchange with another rank broke: the cause is elsewhere then."""
    if isinstance(error, dist.DistError):
        return True
    # gloo raises plain RuntimeErrors that name the place in its source or the connection.
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Connection", "NCCL"))


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class Watchdog:
    """One rank's part: a thread that speaks and listens, and `fail` for the rank's own failures."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        """Begin to speak; every rank has done so before one calls `start`."""
        self.store: Any = store.clone()  # type: ignore[attr-defined]  # the thread's own: the original can be blocked by who waits for a key
        self.rank = rank
        self.ranks = range(world_size)
        self.keeper = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
        self.beats = 0
        self.answered = time.monotonic()  # when the store last did
        self.is_over = threading.Event()
        self.listener = threading.Thread(target=self._listen, daemon=True, name="fairseq_hash watchdog")
        self.store.set(self._key("machine", rank), socket.gethostname())
        self._speak()

    def start(self) -> None:
        """Begin to listen."""
        machines = self.store.multi_get([self._key("machine", rank) for rank in self.ranks])
        # Rank 0 goes with its store, where it keeps that.
        neighbours = [rank for rank in self.ranks if machines[rank] == machines[self.rank] and rank > 0]
        self.speaks_without_store = self.rank == min(neighbours, default=0)
        atexit.register(self.stop)
        self.listener.start()
        threading.Thread(target=self._watch_store, daemon=True, name="fairseq_hash watchdog of the store").start()

    def stop(self) -> None:
        """Stop to listen, before Python ends: a thread that is inside the store then would abort the process."""
        self.is_over.set()
        self.listener.join(PRECEDENCE)

    def fail(self, error: BaseException) -> NoReturn:
        """End this process for an error of this rank; where the cause is another rank, say which."""
        if is_broken_exchange(error):
            self._blame()
        elif not isinstance(error, torch.OutOfMemoryError):
            traceback.print_exception(error)
        self.end(f"rank {self.rank}: {one_line(error)}")

    def end(self, cause: str) -> NoReturn:
        """End this process; print the cause in one line unless another rank was first to give one."""
        try:
            is_first = self.store.add(FAILURE, 1) == 1
        except (RuntimeError, ValueError):  # nobody is left to keep the store
            is_first = True
        self._exit(cause if is_first else None)

    def leave(self) -> NoReturn:
        """End this process for a cause that another rank gives."""
        time.sleep(BROKEN)
        self.end(f"rank {self.rank}: another rank failed and gave no cause within {BROKEN:.0f} s")

    def _exit(self, cause: "str | None") -> NoReturn:
        """End this process; print the cause in one line, or leave that to another rank."""
        if cause is None:
            time.sleep(PRECEDENCE)
        else:
            print(f"fairseq_hash: {cause}", file=sys.stderr, flush=True)
            if self.rank == 0:  # the store may end with this process: the others read in it that the job has failed
                time.sleep(PRECEDENCE / 2)
        logging.shutdown()
        sys.stdout.flush()
        # Not sys.exit: destructors would wait for the other ranks, and this can be another thread than the main one.
        os._exit(1)

    def _exit_without_store(self, what: str) -> NoReturn:
        self._exit(f"{self.keeper}: {what}, and with it the store it kept" if self.speaks_without_store else None)

    def _speak(self) -> None:
        self.store.set(self._key("alive", self.rank), str(self.beats))
        self.beats += 1

    @staticmethod
    def _key(what: str, rank: int) -> str:
        return f"fairseq_hash/{what}/{rank}"

    def _heard(self, ranks: Sequence[int]) -> list[bytes]:
        return self.store.multi_get([self._key("alive", rank) for rank in ranks])

    def _listen(self) -> None:
        others = [rank for rank in self.ranks if rank != self.rank] if self.rank == 0 else [0]
        last, since = [b""] * len(others), [time.monotonic()] * len(others)
        while not self.is_over.wait(INTERVAL):
            try:
                self._speak()
                if self.store.check([FAILURE]):
                    self._exit(None)
                heard = self._heard(others)
            except (RuntimeError, ValueError):
                continue  # `_watch_store` counts the time
            now = self.answered = time.monotonic()
            for place, rank in enumerate(others):
                if heard[place] != last[place]:
                    last[place], since[place] = heard[place], now
                elif now - since[place] > SILENCE:
                    self.end(f"rank {rank}: no sign of life for {SILENCE:.0f} s (killed, or its machine is gone)")

    def _watch_store(self) -> None:
        """End this process when the store no longer answers; a thread that asks a stopped machine waits for ever.

        After the end of training it is no failure that the store goes first: this process ends before its time is over.
        """
        while time.monotonic() - self.answered < SILENCE:
            if self.is_over.wait(INTERVAL):
                return
        self._exit_without_store(f"no sign of life for {SILENCE:.0f} s (killed, or its machine is gone)")

    def _blame(self) -> None:
        """Wait for the cause of a broken exchange, and give it for a rank that cannot."""
        try:
            before = self._heard(self.ranks)
            deadline = time.monotonic() + BROKEN / 2
            while time.monotonic() < deadline:
                time.sleep(INTERVAL / 5)
                if self.store.check([FAILURE]):
                    self._exit(None)
            for rank, (old, new) in enumerate(zip(before, self._heard(self.ranks), strict=True)):
                if old == new:
                    self.end(f"rank {rank}: {GONE}")
        except (RuntimeError, ValueError):
            self._exit_without_store(GONE)


_watchdogs: list[Watchdog] = []  # of this process: none, or one


def watchdog_of(rank: int, world_size: int) -> Watchdog:
    """Return this process's watchdog, which has started; for the first time every rank has to call this."""
    if not _watchdogs:
        # There is no public way to the store of the process group.
        watchdog = Watchdog(dist.distributed_c10d._get_default_store(), rank, world_size)
        dist.barrier()
        watchdog.start()
        _watchdogs.append(watchdog)
    return _watchdogs[0]


def ended_by_errors(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what a function returns; an error in it ends the job if this process's watchdog has started by then."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        for watchdog in _watchdogs:
            watchdog.fail(error)
        raise
