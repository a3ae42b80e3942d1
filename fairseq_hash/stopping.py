"""The signals that stop a training: noted when they come, acted upon after an update that all ranks agree on.

SIGUSR1 and SIGUSR2 always; SIGTERM in a SLURM job, where it announces SIGKILL. `seams.stopping` saves and ends.
"""

import functools
import logging
import os
import signal
import threading
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

# EX_TEMPFAIL of sysexits.h: stopped and saved, the same command goes on. Done is 0, and failed is 1.
EXIT_STATUS = 75
# Of several that came the last one here counts: SLURM adds a SIGTERM to the signal that a launcher asked for.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopSignals:
    """This process's handlers of the signals that stop a training, and what they have noted."""

    def __init__(self) -> None:
        """Begin to listen; a signal does nothing but leave a note from now on."""
        self.process = os.getpid()
        self.noted = 0  # the place in SIGNALS, counted from 1
        self.handlers_before = {}
        if threading.current_thread() is not threading.main_thread():
            logger.warning("training runs outside of the main thread of its process: signals do not stop and save it")
            return
        for number in SIGNALS:
            if number != signal.SIGTERM or "SLURM_JOB_ID" in os.environ:
                self.handlers_before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: "FrameType | None") -> None:
        if os.getpid() == self.process:  # forked workers inherit the handler, and go on working
            self.noted = max(self.noted, SIGNALS.index(number) + 1)

    def agreed(self, device: torch.device) -> "signal.Signals | None":
        """Return the signal that any rank got, or None; every rank has to call this after the same update."""
        noted = self.noted
        if dist.is_initialized() and dist.get_world_size() > 1:
            of_all = torch.tensor(noted, device=device)
            dist.all_reduce(of_all, dist.ReduceOp.MAX)
            noted = int(of_all)
        return SIGNALS[noted - 1] if noted else None

    def hand_on(self, number: signal.Signals) -> NoReturn:
        """Give the signal to its handler from before (submitit's requeues the job), and end this process."""
        handler = self.handlers_before.get(number)
        if callable(handler):
            handler(number, None)
        # Launchers signal the ranks that are left when the first one goes: they are to end with this status, too.
        for own in self.handlers_before:
            signal.signal(own, signal.SIG_IGN)
        raise SystemExit(EXIT_STATUS)


@functools.cache
def stop_signals() -> StopSignals:
    """Return this process's handlers, which listen from the first call on."""
    return StopSignals()


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
