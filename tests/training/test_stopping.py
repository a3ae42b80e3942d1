"""A training that is stopped by a signal and goes on later has the losses of one that was never stopped."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import run_python
from plugin import losses, on_ranks, train, train_arguments
from torch.utils.data import DataLoader

from fairseq_hash.fairseq_patches.signals import _is_command, _what_was_saved
from fairseq_hash.training import stop_signals

SIGNALLED = str(Path(__file__).parents[1] / "support" / "signalled.py")
SPARSE = ("--router", "hash", "--num-experts", "4", "--sparse-layers", "0,1", "--disable-validation")
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
GLOO = ("--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp")


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """The losses of eight updates of two batches each, in one process."""
    return losses(train(data, tmp_path_factory.mktemp("never stopped"), *SPARSE, "--update-freq", "2"))


def test_sigterm_to_all_processes_of_a_job_saves_once(data, tmp_path, uninterrupted):
    options = (*SPARSE, "--update-freq", "2", "--save-interval-updates", "3", "--num-workers", "2")
    given = train_arguments(data, tmp_path, *options)
    done = run_python([SIGNALLED, "SIGTERM", "group", "3", *given], SLURM_JOB_ID="1", CUDA_VISIBLE_DEVICES="")
    said = done.stdout + done.stderr
    assert done.returncode == stop_signals.EXIT_STATUS == 75, said[-3000:]
    assert f"stopped by SIGTERM at update 3; saved {tmp_path}/checkpoint_last.pt, from which the same" in said
    assert said.count("Preparing to save") == 1
    assert "Traceback" not in said
    assert losses(done) + losses(train(data, tmp_path, *options)) == uninterrupted


def test_all_ranks_stop_where_one_is_signalled(data, tmp_path, uninterrupted):
    folder = tmp_path / "saved"
    given = train_arguments(data, folder, *SPARSE, *GLOO)
    done = run_python([*TWO_RANKS, SIGNALLED, "SIGUSR2", "1", "3", *given], OMP_NUM_THREADS="1")
    said = done.stdout + done.stderr
    assert f"stopped by SIGUSR2 at update 3; saved {folder}/checkpoint_last.pt" in said, said[-3000:]
    # The launcher has a status of its own, and says that of the rank that ended first.
    assert done.returncode == 1 and "exitcode  : 75" in said, said[-3000:]
    assert "fairseq_hash: " not in said  # the watchdog saw no failure
    shutil.copytree(folder, tmp_path / "copy")
    again, _ = on_ranks(2, "-m", "fairseq_cli.train", *given)
    alone = train(data, tmp_path / "copy", *SPARSE, "--update-freq", "2")
    for rest in (again, alone):
        assert losses(done) + losses(rest) == pytest.approx(uninterrupted, abs=2e-3)  # they are logged in thousandths
    assert len(losses(done)) == 3


def test_ctrl_c_saves_and_ends_of_it(data, tmp_path, uninterrupted):
    """A terminal sends it to data loader workers, too; a shell ends its loop for a process that ended of SIGINT."""
    options = (*SPARSE, "--update-freq", "2", "--num-workers", "2")
    done = run_python([SIGNALLED, "SIGINT", "group", "3", *train_arguments(data, tmp_path, *options)])
    said = done.stdout + done.stderr
    assert done.returncode == -signal.SIGINT, said[-3000:]
    assert f"stopped by SIGINT at update 3; saved {tmp_path}/checkpoint_last.pt, from which the same" in said
    assert re.findall("^fairseq_hash: (.*)$", said, re.M) == [
        "interrupted: stops after this update; Ctrl-C once more stops now"
    ]
    assert "Traceback" not in said
    assert losses(done) + losses(train(data, tmp_path, *options)) == uninterrupted


def test_all_ranks_stop_for_a_ctrl_c(data, tmp_path, uninterrupted):
    folder = tmp_path / "saved"
    given = train_arguments(data, folder, *SPARSE, *GLOO)
    done, other = on_ranks(2, SIGNALLED, "SIGINT", "1", "3", *given)
    said = done.stdout + done.stderr
    assert f"stopped by SIGINT at update 3; saved {folder}/checkpoint_last.pt" in said, said[-3000:]
    assert done.returncode == other.returncode == -signal.SIGINT
    assert "fairseq_hash: rank" not in said + other.stdout + other.stderr, said[-3000:]
    rest = train(data, folder, *SPARSE, "--update-freq", "2")
    assert losses(done) + losses(rest) == pytest.approx(uninterrupted, abs=2e-3)  # they are logged in thousandths


def test_ctrl_c_before_training_is_one_line(data, tmp_path):
    done = run_python([SIGNALLED, "SIGINT", "0", "0", *train_arguments(data, tmp_path, *SPARSE)])
    assert done.returncode == -signal.SIGINT
    assert done.stderr.splitlines()[-1] == "fairseq_hash: interrupted"
    assert "Traceback" not in done.stdout + done.stderr and "train_inner" not in done.stdout + done.stderr


@pytest.fixture
def handlers():
    """Leave this process's handlers as they were."""
    before = {number: signal.getsignal(number) for number in stop_signals.SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_signal_goes_to_the_handler_from_before(handlers, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    got = []
    for number in stop_signals.SIGNALS:
        signal.signal(number, lambda number, frame: got.append(number))
    signals = stop_signals.StopSignals()
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
    stop_signals.StopSignals()
    assert signal.getsignal(signal.SIGTERM) == handlers[signal.SIGTERM]


def interrupt(times):
    """Send this process SIGINT so often."""
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


def test_one_ctrl_c_waits_for_the_update_and_a_second_does_not(handlers, monkeypatch, capfd):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signals = stop_signals.StopSignals()
    with pytest.raises(KeyboardInterrupt):  # there is no update to wait for
        interrupt(1)
    assert signals.agreed("cpu") is None
    now = 100.0
    monkeypatch.setattr(stop_signals.time, "monotonic", lambda: now)
    with signals.training():
        interrupt(2)  # one, that torchrun has passed on
        assert signals.agreed("cpu") is signal.SIGINT
        now += 2.0
        with pytest.raises(KeyboardInterrupt) as end:
            interrupt(1)
    assert capfd.readouterr().err.count("Ctrl-C once more stops now") == 1
    assert end.value.args == ()
    with pytest.raises(KeyboardInterrupt, match=stop_signals.SAID):
        signals.hand_on(signal.SIGINT)
    with signals.training():  # the next one, in a program that goes on
        assert signals.agreed("cpu") is None
        interrupt(1)
        assert signals.agreed("cpu") is signal.SIGINT


@pytest.mark.parametrize("handler", [signal.SIG_IGN, print], ids=["ignored", "a program's"])
def test_other_handlers_of_ctrl_c_stay(handlers, handler):
    signal.signal(signal.SIGINT, handler)
    stop_signals.StopSignals()
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(
    ("error", "rank", "shown"),
    [
        (KeyboardInterrupt(), "0", "fairseq_hash: interrupted\n"),
        (KeyboardInterrupt(), "1", ""),
        (KeyboardInterrupt(stop_signals.SAID), "0", ""),
        (ValueError("other"), "0", "as before: other\n"),
    ],
)
def test_what_an_interrupted_command_says(monkeypatch, capsys, error, rank, shown):
    monkeypatch.setenv("RANK", rank)
    hook = stop_signals.interrupt_in_one_line(lambda kind, error, trace: print("as before:", error, file=sys.stderr))
    hook(type(error), error, None)
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize(
    ("main", "is_command"),
    [
        ({"__file__": "/a/bin/fairseq-train", "__spec__": None}, True),
        ({"__spec__": SimpleNamespace(name="fairseq_cli.train")}, True),
        ({"__file__": "/a/experiment.py", "__spec__": None}, False),
        ({"__spec__": SimpleNamespace(name="pytest.__main__")}, False),
        ({"__spec__": None}, False),  # at the prompt
    ],
)
def test_only_commands_hide_the_traceback_of_a_ctrl_c(monkeypatch, main, is_command):
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(**main))
    assert _is_command() == is_command


def wait_for_end(child):
    """Return the exit code of a child process."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_forked_workers_end_for_their_parent_only(handlers):
    signals = stop_signals.StopSignals()
    ready, says_ready = os.pipe()
    worker = os.fork()
    if worker == 0:
        stop_signals.end_by_parent_only()
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


def test_data_loader_workers_live_through_a_ctrl_c():
    items = iter(DataLoader(range(50), batch_size=None, num_workers=1))
    got = [next(items)]
    [loader] = multiprocessing.active_children()
    os.kill(loader.pid, signal.SIGINT)
    assert got + list(items) == list(range(50))


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
