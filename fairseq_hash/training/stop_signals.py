"""The signals that stop a training: noted when they come, acted upon after an update that all ranks agree on.

SIGUSR1 and SIGUSR2 always; SIGTERM in a SLURM job, where it announces SIGKILL; SIGINT (Ctrl-C) while the training
loop runs, once: a second one ends at once. `fairseq_patches.signals` saves and ends.
"""

import contextlib
import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import NoReturn

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

# EX_TEMPFAIL of sysexits.h: stopped and saved, the same command goes on. Done is 0, and failed is 1.
EXIT_STATUS = 75
# torchrun passes on the Ctrl-C that its processes have got from the terminal: in so many seconds it is the same one.
SAME_INTERRUPT = 1.0
# Of several that came the last one here counts: SLURM adds a SIGTERM to the signal that a launcher asked for.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


SAID = "all that there is to say has been logged"


def is_first_rank() -> bool:
    """Return whether this is the rank that speaks for all."""
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))) == 0


class StopSignals:
    """This process's handlers of the signals that stop a training, and what they have noted."""

    def __init__(self) -> None:
        """Begin to listen; a signal does nothing but leave a note from now on."""
        self.process = os.getpid()
        self.noted = 0  # the place in SIGNALS, counted from 1
        self.is_training = False
        self.interrupted: float | None = None  # when the first SIGINT came
        self.handlers_before = {}
        if threading.current_thread() is not threading.main_thread():
            logger.warning("training runs outside of the main thread of its process: signals do not stop and save it")
            return
        for number in SIGNALS:
            # A SIGINT that is ignored, as in the background of a script, stays so, and so does a handler of a program.
            listens = {
                signal.SIGINT: signal.getsignal(signal.SIGINT) is signal.default_int_handler,
                signal.SIGTERM: "SLURM_JOB_ID" in os.environ,
            }
            if listens.get(number, True):
                self.handlers_before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: "FrameType | None") -> None:
        if os.getpid() != self.process:  # forked workers inherit the handler, and go on working
            return
        if number == signal.SIGINT:
            self._note_interrupt()
        self.noted = max(self.noted, SIGNALS.index(number) + 1)

    def _note_interrupt(self) -> None:
        """Raise `KeyboardInterrupt` as Python does, unless it is the first one in a training."""
        now = time.monotonic()
        if not self.is_training or (self.interrupted is not None and now - self.interrupted > SAME_INTERRUPT):
            raise KeyboardInterrupt
        if self.interrupted is None:
            self.interrupted = now
            if is_first_rank():
                # Not print, which a signal may come in the middle of.
                os.write(2, b"fairseq_hash: interrupted: stops after this update; Ctrl-C once more stops now\n")

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Let an update end when a SIGINT comes in this context."""
        self.is_training = True
        try:
            yield
        finally:
            self.is_training = False

    def agreed(self, device: torch.device) -> "signal.Signals | None":
        """Return the signal that any rank got, or None; every rank has to call this after the same update."""
        noted = self.noted
        if dist.is_initialized() and dist.get_world_size() > 1:
            of_all = torch.tensor(noted, device=device)
            dist.all_reduce(of_all, dist.ReduceOp.MAX)
            noted = int(of_all)
        return SIGNALS[noted - 1] if noted else None

    def hand_on(self, number: signal.Signals) -> NoReturn:
        """Give the signal to its handler from before (submitit's requeues the job), and end this process.

        Raises:
            SystemExit: with `EXIT_STATUS`.
            KeyboardInterrupt: for SIGINT, of which a process has to end for a shell to end its loop: status 130 there.
        """
        handler = self.handlers_before.get(number)
        if callable(handler) and number != signal.SIGINT:
            handler(number, None)
        if dist.is_initialized():
            # Launchers signal the ranks that are left when the first one goes: they are to end with this status, too.
            for own in self.handlers_before:
                signal.signal(own, signal.SIG_IGN)
        if number == signal.SIGINT:
            self.noted, self.interrupted = 0, None  # for the next training of a program that goes on
            raise KeyboardInterrupt(SAID)
        raise SystemExit(EXIT_STATUS)


@functools.cache
def stop_signals() -> StopSignals:
    """Return this process's handlers, which listen from the first call on."""
    return StopSignals()


def interrupt_in_one_line(previous: Callable[..., None]) -> Callable[..., None]:
    """Return a `sys.excepthook` that shows a Ctrl-C in one line, and all else as the `previous` one does."""

    def hook(kind: type[BaseException], error: BaseException, trace: "TracebackType | None") -> None:
        if not issubclass(kind, KeyboardInterrupt):
            previous(kind, error, trace)
        elif error.args != (SAID,) and is_first_rank():
            print("fairseq_hash: interrupted", file=sys.stderr, flush=True)

    return hook


def end_by_parent_only() -> None:
    """Let a SIGTERM end this forked worker only when it comes from the process that started it.

    SLURM sends it to every process of a job, and a training cannot come to its next checkpoint without its workers.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
            pass
        os._exit(0)  # as torch's own handler does

    threading.Thread(target=wait, daemon=True, name="fairseq_hash waits for SIGTERM").start()
