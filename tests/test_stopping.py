"""A training that is stopped by a signal and goes on later has the losses of one that was never stopped."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from plugin import losses, train, train_arguments
from torch.utils.data import DataLoader

from fairseq_hash import stopping
from fairseq_hash.seams.stopping import _what_was_saved

SIGNALLED = str(Path(__file__).parent / "signalled.py")
SPARSE = ("--router", "hash", "--num-experts", "4", "--sparse-layers", "0,1", "--disable-validation")
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
GLOO = ("--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp")


def run(*arguments, **environment):
    """Run Python in a session of its own; return the finished process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, start_new_session=True)


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """The losses of eight updates of two batches each, in one process."""
    return losses(train(data, tmp_path_factory.mktemp("never stopped"), *SPARSE, "--update-freq", "2"))


def test_sigterm_to_all_processes_of_a_job_saves_once(data, tmp_path, uninterrupted):
    options = (*SPARSE, "--update-freq", "2", "--save-interval-updates", "3", "--num-workers", "2")
    given = train_arguments(data, tmp_path, *options)
    done = run(SIGNALLED, "SIGTERM", "group", "3", *given, SLURM_JOB_ID="1")
    said = done.stdout + done.stderr
    assert done.returncode == stopping.EXIT_STATUS == 75, said[-3000:]
    assert f"stopped by SIGTERM at update 3; saved {tmp_path}/checkpoint_last.pt, from which the same" in said
    assert said.count("Preparing to save") == 1
    assert "Traceback" not in said
    assert losses(done) + losses(train(data, tmp_path, *options)) == uninterrupted


def test_all_ranks_stop_where_one_is_signalled(data, tmp_path, uninterrupted):
    folder = tmp_path / "saved"
    given = train_arguments(data, folder, *SPARSE, *GLOO)
    done = run(*TWO_RANKS, SIGNALLED, "SIGUSR2", "1", "3", *given)
    said = done.stdout + done.stderr
    assert f"stopped by SIGUSR2 at update 3; saved {folder}/checkpoint_last.pt" in said, said[-3000:]
    # The launcher has a status of its own, and says that of the rank that ended first.
    assert done.returncode == 1 and "exitcode  : 75" in said, said[-3000:]
    assert "fairseq_hash: " not in said  # the watchdog saw no failure
    shutil.copytree(folder, tmp_path / "copy")
    again = run(*TWO_RANKS, "-m", "fairseq_cli.train", *given)
    alone = train(data, tmp_path / "copy", *SPARSE, "--update-freq", "2")
    for rest in (again, alone):
        assert losses(done) + losses(rest) == pytest.approx(uninterrupted, abs=2e-3)  # they are logged in thousandths
    assert len(losses(done)) == 3


@pytest.fixture
def handlers():
    """Leave this process's handlers as they were."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_signal_goes_to_the_handler_from_before(handlers, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    got = []
    for number in stopping.SIGNALS:
        signal.signal(number, lambda number, frame: got.append(number))
    signals = stopping.StopSignals()
    assert signals.agreed("cpu") is None
    for number in (signal.SIGUSR2, signal.SIGTERM):
        os.kill(os.getpid(), number)
    assert not got
    assert signals.agreed("cpu") is signal.SIGUSR2  # the one that submitit requeues for
    with pytest.raises(SystemExit) as end:
        signals.hand_on(signal.SIGUSR2)
    assert (got, end.value.code) == ([signal.SIGUSR2], 75)


def test_sigterm_ends_at_once_outside_of_slurm(handlers, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    stopping.StopSignals()
    assert signal.getsignal(signal.SIGTERM) == handlers[signal.SIGTERM]


def wait_for_end(child):
    """Return the exit code of a child process."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_forked_workers_end_for_their_parent_only(handlers):
    signals = stopping.StopSignals()
    ready, says_ready = os.pipe()
    worker = os.fork()
    if worker == 0:
        stopping.end_by_parent_only()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        while signal.SIGTERM in signal.sigpending():  # a second one that comes before it is taken would be lost
            time.sleep(0.01)
        os.write(says_ready, b"%d" % signals.noted)
        signal.pause()
        os._exit(1)
    assert os.read(ready, 1) == b"0"
    os.kill(worker, signal.SIGTERM)
    assert wait_for_end(worker) == 0


def test_data_loader_workers_live_through_a_sigterm_of_the_job(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    items = iter(DataLoader(range(50), batch_size=None, num_workers=1))
    got = [next(items)]
    [loader] = multiprocessing.active_children()
    subprocess.run(["kill", str(loader.pid)], check=True)
    assert got + list(items) == list(range(50))
    loader.terminate()
    loader.join()
    assert loader.exitcode == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "saved runs/checkpoint_last.pt, from which the same command goes on"),
        ({"no_save": True}, "no checkpoint_last.pt was saved (--no-save)"),
        ({"no_last_checkpoints": True}, "no checkpoint_last.pt was saved (--no-last-checkpoints)"),
        ({"restore_file": "a.pt"}, "saved runs/checkpoint_last.pt; to go on from it leave out --restore-file a.pt"),
    ],
)
def test_the_line_says_what_was_saved(options, words):
    usual = {"no_save": False, "no_last_checkpoints": False, "restore_file": "checkpoint_last.pt", "save_dir": "runs"}
    cfg = SimpleNamespace(checkpoint=SimpleNamespace(**{**usual, **options}))
    assert _what_was_saved(cfg, SimpleNamespace(checkpoint_suffix="")) == words
