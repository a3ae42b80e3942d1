"""Jobs on a real SLURM: scripts/slurm/ and sweeps. Signalled jobs go on by themselves, with the losses of one run.

They use the cluster that `sinfo` finds, else one of their own on this machine. `bash scripts/test.sh -m slurm`
"""

import os
import re
import subprocess
import sys

import pytest
from hydra_configs import ROOT, logged
from plugin import command
from slurm_jobs import LIMIT, ONE_TASK, START_SOON, TWO_NODES, Job, slurm, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def uninterrupted(tiny):
    """The losses of one process that never stopped."""
    folder, chosen = tiny
    command("hydra_train", *chosen, "hydra.run.dir=" + str(folder / "alone"))
    return logged(folder / "alone" / "rank0.log")


def assert_same_losses(log, uninterrupted):
    """Check that a run had every update once, with the losses of the yardstick."""
    assert logged(log) == pytest.approx(uninterrupted, abs=5e-3)  # sums in another order, over all updates


@pytest.fixture(scope="module")
def trained(cluster, tiny):
    """A run that was signalled, preempted, and went on each time, in the end on one node instead of two."""
    folder, chosen = tiny
    run = folder / "runs" / "seed1"
    job = Job(folder / "train.txt", TWO_NODES, "train.sh", *chosen)
    job.wait_for_update(run / "rank0.log", 3)
    slurm("scancel", "--batch", "--signal=USR1", job.id)  # as SLURM does when the time limit is near
    job.start_again()
    after = max(logged(run / "rank0.log"))
    job.wait_for_update(run / "rank0.log", after + 3)
    if cluster:
        slurm("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    else:
        slurm("scancel", "--batch", "--signal=USR1", job.id)
    job.start_again("NumNodes=1-1", "NumTasks=1")
    assert job.wait_for_end() == "COMPLETED", job.said()
    return job, run


def test_a_job_goes_on_after_each_stop(trained, cluster, uninterrupted):
    job, run = trained
    said = job.said()
    second = "SIGTERM" if cluster else "SIGUSR1"
    stops = re.findall(rf"stopped by (\w+) at update (\d+); saved {run}/checkpoint_last.pt", said)
    assert [name for name, _ in stops] == ["SIGUSR1", second], said
    assert [int(tasks) for tasks in re.findall(r"train.sh: (\d) tasks? on ", said)] == [2, 2, 1]
    assert "Traceback" not in said
    assert_same_losses(run / "rank0.log", uninterrupted)
    kept = {path.name for path in (run / "slurm").iterdir()}
    expected = {f"{job.id}-{start}.json" for start in range(3)}
    expected |= {f"{job.id}-{start}-{rank}.out" for start, rank in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))}
    assert kept == expected
    assert (run / ".hydra" / "overrides.yaml").is_file()


def test_evaluation_is_a_job(trained, tmp_path):
    _, run = trained
    job = Job(tmp_path / "out.txt", ONE_TASK, "evaluate.sh", run, "--checkpoint", "last")
    assert job.wait_for_end() == "COMPLETED", job.said()
    for subset in ("valid", "test"):
        assert "Perplexity" in (run / f"eval-{subset}.log").read_text()


def test_a_cancelled_job_saves_and_stays_away(tiny):
    folder, chosen = tiny
    run = folder / "cancelled"
    job = Job(folder / "cancelled.txt", ONE_TASK, "train.sh", *chosen, f"hydra.run.dir={run}")
    job.wait_for_update(run / "rank0.log", 2)
    slurm("scancel", job.id)
    assert job.wait_for_end() == "CANCELLED"
    wait_until(lambda: (run / "checkpoint_last.pt").is_file(), job.said)
    assert job.facts()["Restarts"] == "0"


def test_what_cannot_run_fails_in_one_line_and_stays_away(tiny, tmp_path):
    _, chosen = tiny
    unknown = Job(tmp_path / "unknown.txt", ONE_TASK, "train.sh", *chosen, "model.num_expertz=8")
    nothing = Job(tmp_path / "nothing.txt", ONE_TASK, "evaluate.sh")
    for job, line in ((unknown, r"fairseq-hash: .*num_expertz.*"), (nothing, r"evaluate.sh: no run folder given: .*")):
        assert job.wait_for_end() == "FAILED"
        assert job.facts()["Restarts"] == "0"
        assert re.fullmatch(line, job.said().strip()), job.said()


def test_a_job_outside_of_a_checkout_says_so(tmp_path):
    script = ROOT / "scripts" / "slurm" / "train.sh"
    submit = ["sbatch", "--wait", "--output", str(tmp_path / "out.txt"), *ONE_TASK, str(script)]
    assert subprocess.run(submit, cwd=tmp_path, capture_output=True).returncode == 2
    assert (tmp_path / "out.txt").read_text().startswith(f"train.sh: {tmp_path} is no checkout of fairseq_hash; ")


def test_data_are_prepared_in_a_job(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("all the words of a small text\n" * 20)
    texts = [word for split in ("train", "valid", "test") for word in (f"--{split}", tmp_path / f"{split}.txt")]
    given = ("text", *texts, "--words", "--out", tmp_path / "made")
    job = Job(tmp_path / "out.txt", (*ONE_TASK, "--cpus-per-task", "2"), "prepare.sh", *given)
    assert job.wait_for_end() == "COMPLETED", job.said()
    assert (tmp_path / "made" / "train.bin").is_file()


def test_a_job_of_a_sweep_goes_on_after_its_signal(tiny, uninterrupted):
    folder, chosen = tiny
    launcher = ("hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=20", "hydra.launcher.max_num_timeout=3")
    sweep = (sys.executable, "-m", "fairseq_cli.hydra_train", "-m", *chosen, *launcher, "common.seed=1")
    root = f"hydra.sweep.dir={folder / 'sweep'}"
    log = folder / "sweep" / "seed1" / "rank0.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / "sweep.txt", "w") as out:
        process = subprocess.Popen([*sweep, root], stdout=out, stderr=out, cwd=ROOT, env=environment)
    said = (folder / "sweep.txt").read_text
    try:
        wait_until(lambda: log.is_file() and '"num_updates": "3"' in log.read_text(), said)
        [job] = slurm("squeue", "--noheader", "--format=%A", "--states=RUNNING", "--name=hydra_train").split()
        slurm("scancel", "--signal=USR2", job)
        waiting = ("squeue", "--noheader", "--format=%A", "--states=PENDING", "--name=hydra_train")
        wait_until(lambda: slurm(*waiting), said)
        slurm("scontrol", "update", f"JobId={job}", START_SOON)
        assert process.wait(LIMIT) == 0, said()
    finally:
        process.kill()
    assert_same_losses(log, uninterrupted)
