"""A SLURM for tests: the cluster that `sinfo` finds, else one of their own on this machine; and jobs on it."""

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from hydra_configs import ROOT, write_configs

UPDATES = 150
LIMIT = 300
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
START_SOON = "StartTime=now+3"  # within the second in which it was stopped, SLURM's nodes refuse it
LOCAL = Path(__file__).with_name("local_slurm.sh")
ONE_TASK = ("--nodes", "1", "--ntasks", "1")
TWO_NODES = ("--nodes", "2", "--ntasks-per-node", "1", "--exclusive")


def has_cluster():
    """Return whether a SLURM answers."""
    return subprocess.run(["sinfo"], capture_output=True).returncode == 0


def why_not():
    """Return why there is no SLURM to be had, or None."""
    if not shutil.which("sbatch"):
        return "no sbatch: install SLURM (Debian: slurm-wlm and munge)"
    can_start = os.geteuid() == 0 and shutil.which("slurmctld") and shutil.which("munged")
    return (
        None if can_start or has_cluster() else "no running SLURM, and only root with slurmctld and munged starts one"
    )


@contextlib.contextmanager
def alone():
    """Wait until no other process has a cluster here: clusters share munge, the names of nodes, and the cores."""
    with open(Path(tempfile.gettempdir()) / "fairseq_hash_slurm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        yield


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A running SLURM; whether it is our own."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    if has_cluster():
        yield False
        return
    folder = tmp_path_factory.mktemp("slurm")
    with alone():
        try:
            subprocess.run(["bash", LOCAL, "start", folder], check=True, stdin=subprocess.DEVNULL)
            os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
            yield True
        finally:
            subprocess.run(["bash", LOCAL, "stop", folder], check=True)
            os.environ.pop("SLURM_CONF", None)


def slurm(*words):
    """Run a command of SLURM; return what it says."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_until(is_there, what):
    """Wait for something; fail with what `what` returns."""
    deadline = time.monotonic() + LIMIT
    while not is_there():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


class Job:
    """A job that these tests have submitted."""

    def __init__(self, out, options, script, *arguments):
        submit = ("sbatch", "--parsable", "--chdir", ROOT, "--output", out, *options)
        self.id = slurm(*submit, ROOT / "scripts" / "slurm" / script, *arguments)
        self.out = out

    def facts(self):
        """Return what SLURM says of the job."""
        return dict(re.findall(r"(\w+)=(\S*)", slurm("scontrol", "show", "job", "--oneliner", self.id)))

    def said(self):
        """Return the batch shell's output."""
        return self.out.read_text() if self.out.is_file() else ""

    def state(self):
        """Return the job's state."""
        return self.facts()["JobState"]

    def about(self):
        """Return what is known, for a test that fails."""
        return f"{self.facts()}\n{self.said()}"

    def wait_for_end(self):
        """Wait until the job has ended for good, and return its state."""
        wait_until(lambda: self.state() in ENDED, self.about)
        return self.state()

    def wait_for(self, is_there):
        """Wait for something that the job is to do before it ends."""

        def is_there_before_the_end():
            assert self.state() not in ENDED or is_there(), self.about()
            return is_there()

        wait_until(is_there_before_the_end, self.about)

    def wait_for_update(self, log, update):
        """Wait until a run's log has an update."""
        record = f'"num_updates": "{update}"'
        self.wait_for(lambda: log.is_file() and record in log.read_text())

    def start_again(self, *changes):
        """Wait until the job is back in the queue, change it, and start it soon: SLURM itself waits two minutes."""
        self.wait_for(lambda: self.state() == "PENDING")
        slurm("scontrol", "update", f"JobId={self.id}", START_SOON, *changes)


@pytest.fixture(scope="module")
def tiny(data, tmp_path_factory):
    """The folder of a small experiment's configurations and runs, and the arguments that choose it."""
    folder = tmp_path_factory.mktemp("an experiment")
    return folder, write_configs(folder, data, UPDATES)
