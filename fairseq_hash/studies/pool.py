"""Where the workers of a study run: as processes of this machine, or as SLURM jobs through submitit."""

import logging
import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fairseq_hash.core.errors import UserError
from fairseq_hash.studies.worker import ERROR, worker_command

GRACE_SECONDS = 90
SQUEUE_SECONDS = 30  # between two looks at SLURM's queue
JOB = "slurm_job.txt"  # in a run's folder: the job that trains it


class Work(Protocol):
    """A worker that was started. What it prints goes to `log`."""

    log: Path

    def is_done(self) -> bool:
        """Whether it has ended."""

    def stop(self) -> None:
        """Ask it to end; its training leaves a checkpoint."""

    def wait(self) -> None:
        """Wait for its end, if it was asked to end."""


class Pool(Protocol):
    """Starts workers."""

    def start(self, request: Path) -> Work:
        """Start the worker of a request."""


class Process:
    """A worker on this machine."""

    def __init__(self, request: Path) -> None:
        self.log = request.parent / "worker.log"
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                worker_command(request),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def is_done(self) -> bool:
        """Whether the process has ended."""
        return self.child.poll() is not None

    def stop(self) -> None:
        """Ask the process to end; it ends its training."""
        if not self.is_done():
            self.child.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        """Wait for the process's end; kill it if that takes too long."""
        try:
            self.child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.child.pid, signal.SIGKILL)


class Processes:
    """Runs workers on this machine."""

    def start(self, request: Path) -> Process:
        """Start a process."""
        return Process(request)


class Job:
    """A worker as a SLURM job. The study may end before it; the next call finds it again."""

    def __init__(self, job: Any) -> None:
        self.job, self.log = job, Path(job.paths.stderr)
        self.asked = -math.inf

    def is_done(self) -> bool:
        """Whether the job has ended. submitit asks SLURM's accounting; where there is none, the queue tells."""
        if self.job.done():
            return True
        if time.monotonic() - self.asked < SQUEUE_SECONDS:
            return False
        self.asked = time.monotonic()
        return not is_queued(self.job.job_id)

    def stop(self) -> None:
        """Leave the job to SLURM: it goes on, and its record counts in the next call."""

    def wait(self) -> None:
        """Do not wait: nothing was asked of the job."""


class Jobs:
    """Runs workers as SLURM jobs."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        """Take submitit's options of a job (`partition`, `timeout_min`, `gpus_per_node`, ...).

        Raises:
            UserError: if submitit is missing or does not know an option.
        """
        try:
            import submitit
        except ImportError:
            raise UserError("--slurm needs submitit; install it (pip install submitit), or leave --slurm out") from None
        logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns at every look where accounting is missing
        self.submitit, self.folder = submitit, folder
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
            self.executor.update_parameters(**options)
        except (RuntimeError, NameError, TypeError) as error:  # no sbatch here; an option that submitit lacks
            raise UserError(f"--slurm cannot be used: {' '.join(str(error).split())}") from None

    def start(self, request: Path) -> Job:
        """Submit a job, or find the one that an earlier call submitted and that has not ended."""
        known = request.parent / JOB
        if known.is_file():
            job = Job(self.submitit.SlurmJob(folder=self.folder, job_id=known.read_text(encoding="utf-8").strip()))
            if not job.is_done():
                return job
        job = self.executor.submit(self.submitit.helpers.CommandFunction(worker_command(request)))
        known.write_text(f"{job.job_id}\n", encoding="utf-8")
        return Job(job)


def is_queued(job: str) -> bool:
    """Return whether a job, by its ID, waits or runs; also if SLURM gives no answer now."""
    asked = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False)
    is_forgotten = "Invalid job id" in asked.stderr
    return bool(asked.stdout.strip()) or (asked.returncode != 0 and not is_forgotten)


def why_failed(request: Path, log: Path) -> str:
    """Return why the worker of a request, with its log, has ended without a record."""
    error = request.parent / ERROR
    if error.is_file():
        return error.read_text(encoding="utf-8").strip()
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return f"the worker of {request.parent} ended without a record: {lines[-1] if lines else f'{log} says nothing'}"
