"""The GPU round, small and on the CPU: every stage runs, and a stage that fails or is cut off ends no other."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from forked import run_python

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"


@pytest.fixture
def gpu_round(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import gpu_round

    return gpu_round


def test_every_stage_runs_on_a_cpu(data, tmp_path):
    words = [sys.executable, str(SCRIPTS / "gpu_round.py"), str(tmp_path / "a round"), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([*words, "--data", str(data)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    summary = (tmp_path / "a round" / "summary.txt").read_text()
    assert run.stdout == summary and len(summary.splitlines()) <= 60
    for name in ("correct", "layer", "training", "profile", "dry_run", "study"):
        assert f"\n{name}: status 0" in summary and "status 1" not in summary, summary
    assert "\n| Hash | " in summary, summary
    for name in ("layer", "train", "profile"):
        assert json.loads((tmp_path / "a round" / f"{name}.json").read_text())["provenance"]["torch"]
    with tarfile.open(tmp_path / "a round" / "logs.tar.gz") as archive:
        tables = {f"{name}.md" for name in ("layer", "train", "profile", "dry_run", "records/small/results")}
        assert {"correct.log", *tables} <= set(archive.getnames())


def test_a_stage_that_fails_or_takes_too_long_ends_no_other(gpu_round, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_round, "LEAST_SECONDS", 0)
    monkeypatch.setattr(gpu_round, "GRACE_SECONDS", 5)
    say = "print('said', flush=True)"
    stages = [
        gpu_round.Stage("failing", 20, (("-c", f"{say}; 1 / 0"), ("-c", say))),
        gpu_round.Stage("hanging", 8, (("-c", f"{say}\ntry:\n    import time; time.sleep(60)\nfinally:\n    {say}"),)),
        gpu_round.Stage("last", 20, (("-c", say),)),
    ]
    ends = [gpu_round.run_stage(stage, stage.seconds, tmp_path / f"{stage.name}.log") for stage in stages]
    assert [end.partition(";")[0] for end in ends] == ["status 1, status 0", "cut off", "status 0"]
    logs = [(tmp_path / f"{stage.name}.log").read_text() for stage in stages]
    assert "ZeroDivisionError" in logs[0] and [log.count("said\n") for log in logs] == [2, 2, 1]


def test_stages_by_name_and_limit(gpu_round):
    stages = [gpu_round.Stage(name, 100, ()) for name in ("one", "two")]
    assert gpu_round.chosen(stages, None) == stages
    chosen = gpu_round.chosen(stages, ["two:7", "one"])
    assert [(stage.name, stage.seconds) for stage in chosen] == [("two", 7), ("one", 100)]
    # The last one gets what is left, but not more than it was given by name.
    two, one = chosen
    assert (gpu_round.limit_of(two, False, 500), gpu_round.limit_of(two, True, 500)) == (7, 7)
    assert (gpu_round.limit_of(one, False, 500), gpu_round.limit_of(one, True, 500)) == (100, 500)
    assert gpu_round.limit_of(one, False, 30) == 30
    with pytest.raises(SystemExit, match="give NAME or NAME:SECONDS; there are one, two"):
        gpu_round.chosen(stages, ["three"])


def test_the_round_on_a_gpu_fits_in_nine_minutes(gpu_round, tmp_path):
    stages = gpu_round.stages_on_cuda(tmp_path, tmp_path, "data")
    assert [stage.name for stage in stages] == ["correct", "layer", "training", "profile", "dry_run", "study"]
    assert sum(stage.seconds for stage in stages) <= gpu_round.SECONDS <= 540
    assert sum(stage.lines for stage in stages[1:]) <= 50


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("OUT --data nowhere --device cpu", "nowhere holds no binarized text; run bash scripts/gpu_round.sh --prepare"),
        ("OUT --device tpu", "invalid choice: 'tpu'"),
    ],
)
def test_says_what_is_wrong(words, message):
    run = run_python([SCRIPTS / "gpu_round.py", *words.split()])
    assert run.returncode == 2 and message in run.stderr and run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("profile_step.py --candidates plain", "plain and compiled are not profiled"),
        ("profile_step.py --traces nowhere", "--traces nowhere is no folder"),
    ],
)
def test_benchmarks_say_what_is_wrong_before_they_begin(data, words, message):
    name, *others = words.split()
    run = run_python([ROOT / "benchmarks" / name, "--data", data, *others])
    assert run.returncode != 0 and message in run.stderr and run.stderr.count("\n") == 1


def test_prepared_data_stay_what_they_are(gpu_round, tmp_path, monkeypatch, capsys):
    import gpu_prepare

    def made(words):
        said.append(words)
        found = ("making/data/novels-1", "making/data/novels-1-2") if "study" in words else ("whole", "making")
        for name in found:
            (tmp_path / name).mkdir(parents=True, exist_ok=True)

    said = []
    monkeypatch.setattr(gpu_prepare, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu_prepare, "run", made)
    gpu_prepare.binarize(None, 8000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"] and len(said) == 2
    gpu_prepare.prepare_study(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "study"] and len(said) == 3
    gpu_prepare.binarize(tmp_path, 8000)
    gpu_prepare.prepare_study(tmp_path)
    assert len(said) == 3 and ".gpu/data is there and stays" in capsys.readouterr().out
