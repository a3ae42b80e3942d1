"""A study from its file to its report: requests, workers, records, and what is done again and what not."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

import fairseq_hash
from fairseq_hash.cli import main
from fairseq_hash.cli.study import CORE_GIGAFLOPS
from fairseq_hash.core.errors import UserError
from fairseq_hash.experiments.names import own_configs
from fairseq_hash.provenance import usable_cores
from fairseq_hash.reporting import drawing
from fairseq_hash.studies import worker
from fairseq_hash.studies.definition import load_study
from fairseq_hash.studies.records import FINAL, TUNING, read_facts, read_records
from fairseq_hash.studies.schedule import Run
from fairseq_hash.studies.worker import Request

STUDY = {
    "title": "A tiny study",
    "question": "Does all of it run?",
    "limits": "Nothing is learned in four updates.",
    "text": {"name": "little", "pieces": 300, "train_tokens": 4096, "valid_tokens": 512, "test_tokens": 1024},
    "baseline": "Dense",
    "learning_rates": [0.002, 0.004],
    "grow": 0,
    "seeds": [1],
    "validations": 2,
    "models": {
        "Dense": {"experiment": "laptop/dense", "overrides": ["model.decoder_embed_dim=16"]},
        "BASE": {"experiment": "laptop/base", "overrides": ["model.decoder_embed_dim=16"]},
        "BASE, balanced": {"trained_as": "BASE", "options": {"base_evaluation": "balanced"}},
        "Table of BASE": {
            "experiment": "laptop/hash",
            "overrides": ["model.decoder_embed_dim=16"],
            "table_of": "BASE",
            "table": ["from-router", "{checkpoint}", "--text", "{data}", "--layer", "1", "--out", "{out}"],
        },
    },
}


@pytest.fixture(scope="module", autouse=True)
def unrendered():
    """Pictures are made, but not rendered, which takes most of a report's time; test_study_report renders them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "png", lambda figure: b"a picture")
        yield


@pytest.fixture(scope="module")
def little_text(tmp_path_factory):
    """Sentences of a small language, in whose training text all is that is in the others."""
    folder = tmp_path_factory.mktemp("a text")
    generator = np.random.default_rng(1)
    words = ["".join(generator.choice(list("abcdefgh"), 3)) for _ in range(60)]
    for split, lines in (("train", 900), ("valid", 200), ("test", 200)):
        text = "".join(" ".join(generator.choice(words, 8)) + "\n" for _ in range(lines))
        (folder / f"{split}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def study_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "tiny.yaml"
    path.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(little_text, study_file, tmp_path_factory):
    """A study that has run once; its folder of work, and that of its records."""
    work = tmp_path_factory.mktemp("with space") / "the work"
    assert main(["study", str(study_file), "--text", str(little_text), "--work", str(work), "--jobs", "3"]) == 0
    return work, work / "records" / "tiny"


def requests_of(study_file, finished):
    """Return the study, and its requests for the data that is there."""
    fairseq_hash.register()
    from fairseq_hash.studies.requests import Places, Requests

    work, records = finished
    study = load_study(study_file)
    facts = read_facts(records / "text.json")
    data = next(path.parent for path in work.glob("data/*/dict.txt") if path.parent.name.count("-") == 3)
    fingerprint = facts.fingerprint
    return study, Requests(
        study, Places(own_configs(), data, fingerprint, 300, work / "tiny" / "runs", records / "runs", (), 1)
    )


def test_a_study_runs_to_its_report(finished, capsys):
    _, records = finished
    runs = read_records(records / "runs")
    found = {(one.model, one.learning_rate, one.seed, bool(one.test)) for one in runs.values()}
    assert {
        (model, rate, 100, False) for model in ("Dense", "BASE", "Table of BASE") for rate in (0.002, 0.004)
    } <= found
    finals = [one for one in runs.values() if one.test]
    assert sorted((one.model, one.seed) for one in finals) == [("BASE", 1), ("Dense", 1), ("Table of BASE", 1)]
    for one in finals:
        tried = {
            other.learning_rate: other.valid_nats
            for other in runs.values()
            if other.model == one.model and not other.test
        }
        assert one.learning_rate == min(tried, key=tried.get)
        assert set(one.test) == ({"as trained", "base_evaluation=balanced"} if one.model == "BASE" else {"as trained"})
        assert one.tokens == 4096 and one.validations[-1].tokens == 4096 and len(one.validations) == 2
        assert one.test["as trained"].nats == pytest.approx(one.valid_nats, rel=0.2)
        assert sum(one.test["as trained"].position_tokens) == 1024
    text = (records / "results.md").read_text()
    assert "BASE, balanced" in text and "trigram" in text and "A tiny study" in text
    assert {"index.html", "results.csv", "runs.csv", "tuning.csv"} <= {path.name for path in records.iterdir()}


def test_what_is_done_is_not_done_again(finished, study_file, little_text, capsys):
    """Not with the run folders gone either; and a study beside it lends what is the same."""
    work, records = finished
    before = {path.name: path.stat().st_mtime_ns for path in (records / "runs").iterdir()}
    other = study_file.with_name("other.yaml")
    other.write_text(
        yaml.safe_dump({**STUDY, "models": {"The dense one": STUDY["models"]["Dense"]}, "baseline": "The dense one"})
    )
    common = ["--text", str(little_text), "--work", str(work)]
    part = max((work / "data").iterdir(), key=lambda path: len(path.name))  # which serves without the text
    for words in (common, ["--data", str(part), "--work", str(work)]):
        capsys.readouterr()
        assert main(["study", str(study_file), *words]) == 0
        assert {path.name: path.stat().st_mtime_ns for path in (records / "runs").iterdir()} == before
    printed = capsys.readouterr().out
    assert "Test bits per byte" in printed and "trigram" in printed and f"wrote {records / 'results.md'}" in printed
    assert main(["study", str(other), *common]) == 0
    lent = read_records(records.parent / "other" / "runs")
    assert {one.model for one in lent.values()} == {"The dense one"}
    assert set(lent) < set(read_records(records / "runs"))
    assert not (work / "other" / "runs").exists()


def test_the_commands_of_two_runs_differ_in_rate_and_seed_only(study_file, finished):
    """What refers to the rate or the seed has the same value: no option keeps that of another run."""
    study, requests = requests_of(study_file, finished)
    commands = {}
    for rate, seed in ((0.002, 100), (0.004, 7)):
        words = requests.request(Run("Dense", rate, seed, TUNING), {}).command
        place = words.index("--save-dir")
        commands[rate] = words[:place] + words[place + 2 :]
    differing = [(one, other) for one, other in zip(*commands.values(), strict=True) if one != other]
    assert differing == [("100", "7"), ("0.002", "0.004")]


def test_the_record_is_what_the_training_logged(finished):
    """Against the log itself, read with json alone."""
    work, records = finished
    record = next(one for one in read_records(records / "runs").values() if one.model == "Dense" and one.seed == 1)
    folder = work / "tiny" / "runs" / "dense" / f"lr{record.learning_rate:g}-seed1-{record.identity[:8]}"
    lines = [line.split(" | ") for line in (folder / "train.log").read_text().splitlines()]
    logged = [json.loads(line[3]) for line in lines if line[2:3] == ["valid"]]
    assert [one.nats for one in record.validations] == pytest.approx(
        [float(values["valid_nll_loss"]) * math.log(2) for values in logged]
    )
    training = [json.loads(line[3]) for line in lines if line[2:3] == ["train_inner"]]
    assert {values["lr"] for values in training[-1:]} != {f"{0.002:g}"} and record.seconds > 0


def test_an_identity_is_of_what_makes_a_run(study_file, finished):
    study, requests = requests_of(study_file, finished)
    run = Run("Dense", 0.002, 1, FINAL)
    others = [Run("Dense", 0.002, 2, FINAL), Run("Dense", 0.004, 1, FINAL), Run("BASE", 0.002, 1, FINAL)]
    assert len({requests.identity(one, {}) for one in [run, *others]}) == 4
    assert requests.identity(replace(run, stage=TUNING), {}) == requests.identity(run, {})
    assert len({requests.folder(one, {}) for one in [run, *others]}) == 4
    other = type(requests)(study, replace(requests.places, fingerprint="of another text"))
    assert other.identity(run, {}) != requests.identity(run, {}) and other.folder(run, {}) != requests.folder(run, {})


def test_a_made_table_is_of_the_tuned_run(study_file, finished):
    """Its models know the source's rate: with another one they are other runs, with another table."""
    study, requests = requests_of(study_file, finished)
    done = requests.done(read_records(finished[1] / "runs"))
    model, run = study.models["Table of BASE"], Run("Table of BASE", 0.002, 1, FINAL)
    source = requests.source(model, done)
    assert source.model == "BASE" and source.seed == study.tuning_seed
    path = requests.table_path(model, done)
    assert path.is_file() and requests.request(run, done).command.count(str(path)) == 1
    grown = {one: replace(record, diverged="yes") if one == source else record for one, record in done.items()}
    assert requests.source(model, grown) != source
    assert requests.identity(run, grown) != requests.identity(run, done)
    assert requests.table_path(model, grown) != path


def test_records_of_other_runs_stop_the_study(study_file, finished, little_text, tmp_path, capsys):
    """Another text or other options would overwrite them: one line, and they stay as they are."""
    work, records = finished
    copy = tmp_path / "records"
    shutil.copytree(records, copy)
    before = {path: path.read_bytes() for path in sorted(copy.rglob("*.json"))}
    other = tmp_path / "other text"
    shutil.copytree(little_text, other)
    (other / "train.txt").write_text((little_text / "train.txt").read_text().replace("a", "i"))
    where = ["--work", str(work), "--records", str(copy)]
    for words in (["--text", str(other)], ["--text", str(little_text), "--override", "model.dropout=0.1"]):
        assert main(["study", str(study_file), *words, *where]) == 1
        error = capsys.readouterr().err
        assert "is of another text or of other options" in error and error.count("\n") == 1
    assert {path: path.read_bytes() for path in sorted(copy.rglob("*.json"))} == before


def test_a_loss_that_is_no_number_is_a_divergence(finished):
    """fairseq stops for gradients that are no numbers, not for such a validation."""
    log = next((finished[0] / "tiny" / "runs" / "dense").glob("lr0.002-seed100-*")) / "train.log"
    request = Request(**json.loads((log.parent / "request.json").read_text()) | {"folder": str(log.parent)})
    whole = log.read_text()
    last = [line for line in whole.splitlines() if " | valid | " in line][-1]
    value = json.loads(last.split(" | ")[3])["valid_nll_loss"]
    try:
        log.write_text(whole.replace(last, last.replace(f'"valid_nll_loss": "{value}"', '"valid_nll_loss": "nan"')))
        record = worker._of_training(request, "")
    finally:
        log.write_text(whole)
    assert record.diverged == "its loss on valid is no number" and record.valid_nats == math.inf
    assert len(record.validations) == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "name a study"),
        (["nothing"], "there is no study"),
        (["{study}"], "the study's text is little; give the folder"),
        (["{study}", "--text", "{tmp}"], "has no train.txt; give a folder of"),
        (["{study}", "--text", "{text}", "--data", "{tmp}"], "--text and --data both say what the study reads"),
        (["{study}", "--data", "{tmp}"], "has no dict.txt; give a folder that a study made"),
        (["{study}", "--data", "{whole}"], "of train and the study takes 4,096; give the folder"),
        (["{study}", "--text", "{text}", "--jobs", "0"], "--jobs 0 is out of range"),
        (["{study}", "--text", "{text}", "--slurm", "hours"], "--slurm hours is no KEY=VALUE"),
        (["{study}", "--report", "--records", "{tmp}"], "has no record of the study's text"),
        (["{study}", "--text", "{text}", "--work", "{work}", "--override", "model.colour=1"], "no option model.colour"),
    ],
)
def test_bad_input_is_one_line(words, line, finished, study_file, little_text, tmp_path, capsys):
    whole = min((finished[0] / "data").iterdir(), key=lambda path: len(path.name))  # of which the study takes a part
    names = {"study": study_file, "text": little_text, "tmp": tmp_path, "work": finished[0], "whole": whole}
    assert main(["study", *(word.format(**names) for word in words)]) == 1
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("program", "diverged"),
    [
        ("raise FloatingPointError('Minimum loss scale reached')", "FloatingPointError: Minimum loss scale reached"),
        ("raise RuntimeError('no luck')", None),
        ("raise RuntimeError('no luck in finance: information')", None),  # neither "inf" nor "nan"
        ("", None),
    ],
)
def test_a_training_that_breaks_off_has_diverged_or_failed(tmp_path, program, diverged):
    """Only a loss that is no number is a result of the learning rate; a failure names its log."""
    rest = dict.fromkeys(("record", "identity", "model", "data", "data_fingerprint"), "")
    rest |= dict.fromkeys(("learning_rate", "seed", "parameters", "active", "experts", "flops_per_token"), 0)
    command = [sys.executable, "-c", program]
    places = {"folder": str(tmp_path), "command": command}
    request = Request(**places, experiment=[], tokens_per_update=1, evaluations={}, threads=1, **rest)
    if diverged:
        assert worker.train(request) == diverged
        return
    with pytest.raises(UserError) as failure:
        worker.train(request)
    assert f"(all of it: {tmp_path / 'train.log'})" in str(failure.value) and "\n" not in str(failure.value)
    assert not program or "RuntimeError: no luck" in str(failure.value)


def test_a_model_that_cannot_be_trained_is_refused_before_the_others_are(
    study_file, little_text, finished, tmp_path, capsys
):
    bad = tmp_path / "bad.yaml"
    models = {
        "Dense": STUDY["models"]["Dense"],
        "Bad": {"experiment": "laptop/dense", "overrides": ["+model.from_dense=x"]},
    }
    bad.write_text(yaml.safe_dump({**STUDY, "models": models}))
    assert main(["study", str(bad), "--text", str(little_text), "--work", str(finished[0])]) == 1
    error = capsys.readouterr().err
    assert "--from-dense x needs experts" in error and error.count("\n") == 1
    assert not (finished[0] / "bad" / "runs").exists()


def test_ctrl_c_ends_the_trainings_and_the_study_goes_on(study_file, little_text, finished, tmp_path):
    """SIGINT while the first runs train: no process is left, and the same command finishes."""
    work = finished[0]
    long = tmp_path / "long.yaml"
    changes = {"text": {**STUDY["text"], "train_tokens": 8192}, "models": {"Dense": STUDY["models"]["Dense"]}}
    long.write_text(yaml.safe_dump({**STUDY, **changes, "learning_rates": [0.002], "seeds": [1]}))
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "from fairseq_hash.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["study", str(long), "--text", str(little_text), "--work", str(work), "--jobs", "1"]
    child = subprocess.Popen([sys.executable, "-c", program, *words], stderr=subprocess.PIPE, text=True)
    runs = work / "long" / "runs" / "dense"
    while not any("train_inner" in log.read_text() for log in runs.glob("*/train.log")) and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate()
    assert child.returncode == 130 and "the same command goes on" in error.splitlines()[-1]
    found = subprocess.run(["pgrep", "-f", str(work / "long")], capture_output=True, text=True, check=False)
    assert found.stdout == ""
    assert main(words) == 0
    assert len(read_records(work / "records" / "long" / "runs")) == 1


def test_a_plan_has_hours_before_any_run_and_after(study_file, little_text, finished, tmp_path, capsys):
    """FLOPs of all runs over what a core makes, then those of the runs that are done."""
    words = ["study", str(study_file), "--text", str(little_text), "--work", str(finished[0]), "--jobs", "1", "--plan"]
    assert main([*words, "--records", str(tmp_path / "elsewhere" / "tiny")]) == 0
    plan = capsys.readouterr().out
    (flops,) = re.findall(r"([0-9.e+]+) FLOPs$", plan, re.MULTILINE)
    ((least, most),) = re.findall(r"about ([0-9.e-]+) to ([0-9.e-]+) hours with 1 at once", plan)
    cores = usable_cores()
    expected = [float(flops) / speed / 1e9 / cores / 3600 for speed in reversed(CORE_GIGAFLOPS)]
    assert [float(least), float(most)] == pytest.approx(expected, rel=0.06)
    assert main([*words, "--slurm", "--records", str(tmp_path / "elsewhere" / "tiny")]) == 0
    assert "hours: not known before a run is done" in capsys.readouterr().out
    assert main(words) == 0
    plan = capsys.readouterr().out
    assert "left: 0 runs" in plan and "as fast as the" in plan


def test_a_slurm_job_takes_the_cores_that_it_has(study_file, little_text, finished):
    """Not those of the machine that submits it."""
    from fairseq_hash.studies.study import Setting, open_study

    work, records = finished
    setting = Setting(own_configs(), little_text, None, work, records, 64, slurm={})
    request = open_study(load_study(study_file), setting).requests.request(Run("Dense", 0.002, 100, TUNING), {})
    assert request.threads is None and request.threads_here == usable_cores()
    assert replace(request, threads=3).threads_here == 3


def test_a_number_at_the_end_of_a_name_is_that_of_the_experts(study_file, little_text, finished, tmp_path, capsys):
    bad = tmp_path / "bad.yaml"
    models = {"Dense": STUDY["models"]["Dense"], "Hash 8": {"experiment": "laptop/hash"}}
    bad.write_text(yaml.safe_dump({**STUDY, "models": models, "scaling": True}))
    assert main(["study", str(bad), "--text", str(little_text), "--work", str(finished[0]), "--plan"]) == 1
    assert "Hash 8 has 16 experts" in capsys.readouterr().err


def test_a_broken_record_is_one_line(tmp_path):
    (tmp_path / "run.json").write_text('{"model": "x"}')
    with pytest.raises(UserError, match="is no record of a study"):
        read_records(tmp_path)
    assert Path(tmp_path / "run.json").is_file()
