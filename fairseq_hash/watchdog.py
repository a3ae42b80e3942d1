"""Ends a job whose ranks wait for each other when one of them fails: soon, and with one line that names it.

Every rank says every second, in the store of the process group, that it is alive; rank 0 listens to all, all listen to
rank 0. A rank that fails writes the cause there, first come first; all others leave without a word. A rank that cannot
write any more (killed, lost machine) is noticed by those whose exchange with it breaks, within `BROKEN` seconds, or for
its silence, within `SILENCE` seconds. That a thread speaks for the rank means: a slow update is no failure.
"""

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

INTERVAL = 1.0
BROKEN = 10.0
SILENCE = 60.0
# Launchers blame the rank that they see end first: the others give it this much time.
PRECEDENCE = 2.0
FAILURE = "fairseq_hash/failure"


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
        self.store = store.clone()  # the thread's own: the original can be blocked by who waits for a key
        self.rank = rank
        self.ranks = range(world_size)
        self.beats = 0
        self.stopped = threading.Event()
        self._speak()

    def start(self) -> None:
        """Begin to listen, and take care of errors that nobody catches."""
        previous = sys.excepthook

        def hook(kind: type[BaseException], error: BaseException, trace: "TracebackType | None") -> None:
            if not is_broken_exchange(error):
                previous(kind, error, trace)
            if not issubclass(kind, KeyboardInterrupt):
                self.fail(error)

        sys.excepthook = hook
        self.listener = threading.Thread(target=self._listen, daemon=True, name="fairseq_hash watchdog")
        self.listener.start()
        # A thread that Python's end meets inside the store's C++ code would abort the process.
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the thread, at the end of the process."""
        self.stopped.set()
        self.listener.join(BROKEN)

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with every error made the end of the job."""

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                self.fail(error)

        return call

    def fail(self, error: BaseException) -> NoReturn:
        """End this process for an error of this rank; where the cause is another rank, say which."""
        if is_broken_exchange(error):
            self._blame()
        self.end(f"rank {self.rank}: {one_line(error)}")

    def end(self, cause: str) -> NoReturn:
        """End this process; print the cause in one line unless another rank was first to give one."""
        try:
            first = self.store.compare_set(FAILURE, "", cause).decode() == cause
        except (RuntimeError, ValueError):  # nobody is left to keep the store
            first = True
        if first:
            print(f"fairseq_hash: {cause}", file=sys.stderr, flush=True)
        else:
            time.sleep(PRECEDENCE)
        logging.shutdown()
        sys.stdout.flush()
        # Not sys.exit: destructors would wait for the other ranks, and this can be another thread than the main one.
        os._exit(1)

    def leave(self) -> NoReturn:
        """End this process for a cause that another rank gives."""
        time.sleep(BROKEN)
        self.end(f"rank {self.rank}: another rank failed and gave no cause within {BROKEN:.0f} s")

    def _speak(self) -> None:
        self.store.set(self._key(self.rank), str(self.beats))
        self.beats += 1

    @staticmethod
    def _key(rank: int) -> str:
        return f"fairseq_hash/alive/{rank}"

    def _heard(self, ranks: Sequence[int]) -> list[bytes]:
        return self.store.multi_get([self._key(rank) for rank in ranks])

    def _listen(self) -> None:
        others = [rank for rank in self.ranks if rank != self.rank] if self.rank == 0 else [0]
        last, since = self._heard(others), [time.monotonic()] * len(others)
        lost = None
        while not self.stopped.wait(INTERVAL):
            try:
                self._speak()
                if self.store.check([FAILURE]):
                    self.end("")
                heard = self._heard(others)
                lost = None
            except (RuntimeError, ValueError):
                # The store went with the process that keeps it. After the end of training that is no failure: this
                # process ends before its time is over.
                lost = lost or time.monotonic()
                if time.monotonic() - lost > SILENCE:
                    self.end(f"rank {self.rank}: lost the store of the process group, kept by rank 0 or the launcher")
                continue
            now = time.monotonic()
            for place, rank in enumerate(others):
                if heard[place] != last[place]:
                    last[place], since[place] = heard[place], now
                elif now - since[place] > SILENCE:
                    self.end(f"rank {rank}: no sign of life for {SILENCE:.0f} s (killed, or its machine is gone)")

    def _blame(self) -> None:
        """Wait for the cause of a broken exchange, and give it for a rank that cannot."""
        try:
            before = self._heard(self.ranks)
            deadline = time.monotonic() + BROKEN / 2
            while time.monotonic() < deadline:
                time.sleep(INTERVAL / 5)
                if self.store.check([FAILURE]):
                    self.end("")
            for rank, (old, new) in enumerate(zip(before, self._heard(self.ranks), strict=True)):
                if old == new:
                    self.end(f"rank {rank}: ended without a word (killed, or its machine is gone)")
        except (RuntimeError, ValueError):
            self.end("rank 0: ended without a word (killed, or its machine is gone), and with it the store it kept")
