"""Faults that SLURM itself makes: a node that is lost, a time limit that ends, and the tasks of a job array.

On a cluster as in test_slurm.py: `bash scripts/test.sh -m slurm tests/scripts/test_slurm_faults.py -n 0`
"""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest
from hydra_configs import logged
from slurm_jobs import ONE_TASK, TWO_NODES, Job, slurm, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]


def all_losses(log):
    """Return {update: losses} of a run's log, in which an update may stand twice."""
    found = {}
    for line in log.read_text().splitlines(keepends=True):
        if '"num_updates"' in line:
            part = log.with_suffix(".one")
            part.write_text(line)
            for update, loss in logged(part).items():
                found.setdefault(update, []).append(loss)
    return found


def processes_on(node):
    """Return the processes on a node of this cluster, its SLURM included."""
    configuration = f"SLURM_CONF={os.environ['SLURM_CONF']}\0".encode()
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may have ended
            environment = (folder / "environ").read_bytes()
            if configuration not in environment:
                continue
            if f"SLURMD_NODENAME={node}\0".encode() in environment:
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                found |= {int(folder.name)}
                found |= {int(parent)} if "slurmstepd" in Path(f"/proc/{parent}/comm").read_text() else set()
            elif (folder / "cmdline").read_bytes() == f"slurmd\0-N\0{node}\0".encode():
                found |= {int(folder.name)}
    return found


def lose_power(node):
    """Kill all that runs on a node of this cluster; all stop first, so that none lives to tell of another's end."""
    processes = processes_on(node)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)


def test_a_job_goes_on_after_a_node_is_lost(tiny, cluster):
    """Nobody gets a signal, and nothing is saved. SLURM queues the job again when it knows that the node is gone."""
    if not cluster:
        pytest.skip("only a cluster of this test's own may lose a node")
    folder, chosen = tiny
    run = folder / "node lost"
    more = (f"hydra.run.dir='{run}'", "checkpoint.save_interval_updates=10", "checkpoint.keep_interval_updates=1")
    job = Job(folder / "lost.txt", TWO_NODES, "train.sh", *chosen, *more)
    job.wait_for_update(run / "rank0.log", 13)
    lose_power("n2")
    try:
        said = run / "slurm" / f"{job.id}-0-0.out"
        job.wait_for(lambda: "rank 1: ended without a word (killed, or its machine is gone)" in said.read_text())
        slurm("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")  # SLURM's own timeout is minutes long
        job.start_again("NumNodes=1-1", "NumTasks=1")
        assert job.wait_for_end() == "COMPLETED", job.said()
    finally:
        subprocess.run(["slurmd", "-N", "n2"], check=True)
    assert job.facts()["Restarts"] == "1"
    losses = all_losses(run / "rank0.log")
    assert sorted(losses) == list(range(1, 151))
    twice = {update for update, values in losses.items() if len(values) == 2}
    assert twice and len(twice) < 20  # only what came after the last save was done again
    assert all(max(values) - min(values) < 5e-3 for values in losses.values())


def test_a_time_limit_saves_and_requeues(tiny, cluster):
    """SLURM's own signal before a limit; the job is in the queue again, with all that it had done."""
    folder, chosen = tiny
    run = folder / "limit"
    limit = ("--time", "60", "--signal", "B:USR1@60")
    more = (f"hydra.run.dir={run}", "optimization.max_update=1000000")
    job = Job(folder / "limit.txt", (*ONE_TASK, *limit), "train.sh", *chosen, *more)
    job.wait_for_update(run / "rank0.log", 2)  # a limit is in minutes, and to start takes up to one of them
    hours, minutes, _ = map(int, job.facts()["RunTime"].split(":"))
    slurm("scontrol", "update", f"JobId={job.id}", f"TimeLimit={60 * hours + minutes + 2}")
    try:
        job.wait_for(lambda: job.facts()["Restarts"] == "1")
        assert "SIGUSR1" in job.said() and f"saved {run}/checkpoint_last.pt" in job.said()
        assert (run / "checkpoint_last.pt").is_file()
    finally:
        slurm("scancel", job.id)


def test_tasks_of_an_array_are_runs_of_their_own(tiny):
    folder, chosen = tiny
    words = (*chosen, "common.seed=${oc.env:SLURM_ARRAY_TASK_ID}", "optimization.max_update=5")
    root = f"hydra.run.dir={folder}/array/${{common.seed}}"
    job = Job(folder / "array-%a.txt", (*ONE_TASK, "--array", "3-4"), "train.sh", *words, root)
    wait_until(lambda: not slurm("squeue", "--noheader", f"--jobs={job.id}"), lambda: str(list(folder.iterdir())))
    first, second = (logged(folder / "array" / seed / "rank0.log") for seed in "34")
    assert list(first) == list(second) == [1, 2, 3, 4, 5] and first != second
    kept = {path.name.split("-")[0] for seed in "34" for path in (folder / "array" / seed / "slurm").glob("*.json")}
    assert len(kept) == 2
