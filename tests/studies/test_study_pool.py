"""Where workers run: when a SLURM job has ended, with and without accounting, and what a worker's end says."""

from types import SimpleNamespace

import pytest

from fairseq_hash.studies import pool
from fairseq_hash.studies.pool import Job, Process, is_queued, why_failed

RUNNING = "echo '  7  cpu  name  me  R  0:29  1  n2'"
FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
DEAF = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Make a `squeue` that does what it is told."""

    def tell(program):
        path = tmp_path / "bin" / "squeue"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\n[ "$*" = "--noheader --jobs 7" ] || exit 9\n{program}\n')
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")

    return tell


@pytest.mark.parametrize(("program", "queued"), [(RUNNING, True), ("true", False), (FORGOTTEN, False), (DEAF, True)])
def test_a_job_in_the_queue(squeue, program, queued):
    """A controller that does not answer now says nothing about the job."""
    squeue(program)
    assert is_queued("7") is queued


def test_without_accounting_the_queue_tells(squeue, tmp_path, monkeypatch):
    """It is asked at most every so many seconds; a job that submitit knows to have ended needs no queue."""
    known = SimpleNamespace(job_id="7", paths=SimpleNamespace(stderr=tmp_path / "7.err"), done=lambda: False)
    now = [0.0]
    monkeypatch.setattr(pool.time, "monotonic", lambda: now[0])
    squeue(RUNNING)
    job = Job(known)
    assert not job.is_done()
    squeue(FORGOTTEN)
    now[0] += pool.SQUEUE_SECONDS - 1
    assert not job.is_done()
    now[0] += 2
    assert job.is_done()
    squeue("exit 9")
    known.done = lambda: True
    assert Job(known).is_done()


def test_what_a_failed_worker_says(tmp_path):
    """Its own line; else the last one of its log; else where that log is."""
    request, log = tmp_path / "request.json", tmp_path / "7.err"
    assert why_failed(request, log) == f"the worker of {tmp_path} ended without a record: {log} says nothing"
    log.write_text("first\nslurmstepd: error: *** JOB 7 CANCELLED ***\n")
    assert why_failed(request, log).endswith("without a record: slurmstepd: error: *** JOB 7 CANCELLED ***")
    (tmp_path / "error.txt").write_text("the training failed: no luck\n")
    assert why_failed(request, log) == "the training failed: no luck"


def test_workers_are_asked_to_end_before_they_are_waited_for(tmp_path, monkeypatch):
    program = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); print(1, flush=True)"
    command = ["python", "-u", "-c", f"{program}; time.sleep(60)"]
    monkeypatch.setattr(pool, "worker_command", lambda request: command)
    works = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        works.append(Process(tmp_path / str(number) / "request.json"))
    while any(work.log.read_text() == "" for work in works):
        pass
    assert not any(work.is_done() for work in works)
    for work in works:
        work.stop()
    for work in works:
        work.wait()
    assert [work.child.returncode for work in works] == [3, 3]
    works[0].stop()  # one that has ended already
