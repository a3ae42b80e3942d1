"""fairseq_hash.reporting.runs: real run folders, each spoiled in one way, are left out with the reason or refused."""

import json
import os
import re
import shutil
import time

import pytest
from made_runs import NAMES, edit, perplexity, raw, write_run

from fairseq_hash.core.errors import UserError
from fairseq_hash.reporting.compare import sort_out
from fairseq_hash.reporting.runs import load_run, load_runs


def reasons(folder, names=NAMES):
    """Return the names of the compared runs, and why each other one is left out by its name."""
    compared, left_out = sort_out(load_runs([folder / name for name in names]))
    return [run.folder.name for run in compared], {path.name: reason for path, reason in left_out.items()}


def cut(path, text):
    """End a file in the middle of the line where a text last stands."""
    whole = path.read_text()
    path.write_text(whole[: whole.rindex(text) + len(text)])


def without(path, text):
    """Delete the lines of a file that hold a text."""
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if text not in line]
    assert len(kept) < len(lines)
    path.write_text("".join(kept))


def test_what_a_run_holds(made):
    run = load_run(made / "dense6")
    assert run.seed == 6 and run.folder == made / "dense6" and run.record == {}
    printed = {subset: perplexity(made / "dense6", subset) for subset in ("valid", "test")}
    assert {name: one.perplexity for name, one in run.evaluations.items()} == printed
    assert all(one.checkpoint == "checkpoint_last.pt" and one.tokens > 500 for one in run.evaluations.values())
    assert run.options == load_run(made / "dense5").options != load_run(made / "hash5").options


def test_complete_runs_are_compared(made):
    """One that was not evaluated by its validations; only of one model all runs are evaluated alike."""
    assert reasons(made) == (list(NAMES), {})
    assert reasons(made, [*NAMES, "hydra"]) == ([*NAMES, "hydra"], {})
    assert reasons(made, ["hydra"]) == (["hydra"], {})


def grew_long_ago(path):
    """Let a log be an old one, of a time that this machine's clock calls 2001."""
    os.utime(path, (1e9, 1e9))


SINCE = r"its log has not grown since 2001-09-0\d \d\d:46; its command, given again, goes on from its last checkpoint"
SPOILED = {
    "cut in the middle of a line": (
        lambda run: (cut(run / "train.log", '"num_updates": "7"'), grew_long_ago(run / "train.log")),
        f"its training broke off at update 6 of 8, and {SINCE}",
    ),
    "killed before its end": (
        lambda run: (cut(run / "train.log", "Stopping training due to"), grew_long_ago(run / "train.log")),
        f"its training did not end after update 8, its last one, and {SINCE}",
    ),
    "nan": (
        lambda run: edit(run / "eval-valid.log", f"Perplexity: {perplexity(run, 'valid')}", "Perplexity: nan"),
        "its perplexity on valid is nan",
    ),
    "inf": (
        lambda run: edit(run / "eval-test.log", f"Perplexity: {perplexity(run, 'test')}", "Perplexity: inf"),
        "its perplexity on test is inf",
    ),
    "evaluation with another context": (
        lambda run: edit(run / "eval-test.log", "'tokens_per_sample': 16", "'tokens_per_sample': 32"),
        "task.tokens_per_sample of the evaluation on test is 32, in the other runs 16",
    ),
    "evaluation with a context window": (
        lambda run: edit(run / "eval-test.log", "'context_window': 0", "'context_window': 8"),
        "eval_lm.context_window of the evaluation on test is 8, in the other runs 0",
    ),
    "evaluation of another checkpoint": (
        lambda run: edit(run / "eval-valid.log", "checkpoint_last.pt", "checkpoint_best.pt"),
        "the checkpoint evaluated on valid is checkpoint_best.pt, in the other runs checkpoint_last.pt",
    ),
    "evaluation of other text": (
        lambda run: edit(run / "eval-valid.log", "Evaluated ", "Evaluated 1,"),
        r"the number of valid tokens is 1,\d{3}, in the other runs \d{3}",
    ),
    "no model record": (
        lambda run: without(run / "train.log", "model_record"),
        "its log has no model_record: trained without --arch hash_transformer_lm",
    ),
    "no statistics": (
        lambda run: (without(run / "train.log", "| train_inner |"), without(run / "train.log", "| train |")),
        "its log has no statistics of the training; train with --log-format json",
    ),
}


@pytest.mark.parametrize("name", ["dense6", pytest.param("switch5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_run_is_left_out_with_the_reason(copies, name, how):
    spoil, reason = SPOILED[how]
    spoil(copies / name)
    compared, left_out = reasons(copies)
    assert list(left_out) == [name] and re.fullmatch(reason, left_out[name])
    assert compared == [other for other in NAMES if other != name]


def of_nothing(log, scored="0", skipped=38):
    """Make an evaluation one that left samples out, in the words that fairseq itself has for it."""
    said = f"{skipped} samples have invalid sizes and will be skipped, max_positions=16"
    lines = rf"\1WARNING | fairseq.tasks.fairseq_task | {said}\n\1INFO | \g<2>{scored}"
    text = re.sub(r"(?m)^(.*)INFO \| (.*Evaluated )[\d,]+", lines, log.read_text())
    log.write_text(re.sub("Perplexity: .*", "Perplexity: 1.00", text))


FAULTY = {
    "killed": (lambda log: cut(log, "Evaluated"), "has no result: its log ends without one"),
    "refused": (
        lambda log: (cut(log, "| Evaluated"), log.open("a").write(" it\nfairseq_hash: no room; make some\n")),
        "has no result: fairseq_hash: no room; make some",
    ),
    "no token": (
        lambda log: of_nothing(log),
        "left out 38 samples that were too long for the model; repeat it with --tokens-per-sample 16",
    ),
    "a few tokens": (
        lambda log: of_nothing(log, "7", 1),
        "left out 1 samples that were too long for the model; repeat it with --tokens-per-sample 16",
    ),
    "no token, no warning": (
        lambda log: log.write_text(re.sub("Evaluated [0-9,]+", "Evaluated 0", log.read_text())),
        "scored no token; repeat it with --tokens-per-sample 16",
    ),
    "a shard": (
        lambda log: edit(log, "'num_shards': 1", "'num_shards': 4"),
        "scored one of 4 parts of the text; repeat it in one process, without --num-shards",
    ),
    "one of two ranks": (
        lambda log: edit(log, "'distributed_world_size': 1", "'distributed_world_size': 2"),
        "scored one of 2 parts of the text; repeat it in one process, without --num-shards",
    ),
    "older than the training": (
        lambda log: log.write_text(re.sub(r"(?m)^20\d\d", "2001", log.read_text())),
        "was made before training was done; repeat it",
    ),
    "another dictionary": (
        lambda log: edit(log, '"dictionary_fingerprint": "', '"dictionary_fingerprint": "9'),
        "was made with another dictionary than the training",
    ),
}


@pytest.mark.parametrize("how", FAULTY)
def test_a_faulty_evaluation_is_left_out_with_the_reason(copies, how):
    """The run stays, unless another run of its model was evaluated: means are over the same runs."""
    spoil, reason = FAULTY[how]
    for name in ("dense6", "switch5"):
        spoil(copies / name / "eval-test.log")
    compared, left_out = reasons(copies)
    assert compared == ["dense5", "hash5", "switch5"]
    assert left_out == {"dense6": f"the evaluation on test {reason}"}
    run = load_run(copies / "switch5")
    assert run.faults == {"test": reason} and list(run.evaluations) == ["valid"]


def test_faulty_evaluations_never_displace_a_good_one(copies):
    """Three of four runs scored nothing: the fourth one's figure stands, alone."""
    for name in NAMES[1:]:
        of_nothing(copies / name / "eval-test.log")
        of_nothing(copies / name / "eval-valid.log")
    compared, left_out = reasons(copies)
    assert compared == ["dense5", "hash5", "switch5"] and list(left_out) == ["dense6"]
    found = {name: load_run(copies / name).evaluations for name in compared}
    assert found["dense5"]["test"].perplexity == perplexity(copies / "dense5", "test") != 1
    assert found["hash5"] == found["switch5"] == {}


def test_a_later_evaluation_that_failed_does_not_displace_a_good_one(copies):
    """It was repeated, and killed, or given the wrong length."""
    log = copies / "hash5" / "eval-test.log"
    good, whole = perplexity(copies / "hash5", "test"), log.read_text()
    log.write_text(whole + whole.replace("Loss (base 2)", "Killed"))
    shutil.copy(log, copies / "hash5" / "z.log")
    of_nothing(copies / "hash5" / "z.log")
    run = load_run(copies / "hash5")
    assert run.evaluations["test"].perplexity == good and run.faults == {}


def test_a_run_that_is_not_evaluated_as_its_like(copies):
    (copies / "dense6" / "eval-test.log").unlink()
    (copies / "switch5" / "eval-test.log").unlink()
    compared, left_out = reasons(copies)
    assert compared == ["dense5", "hash5", "switch5"]
    assert left_out == {"dense6": "not evaluated on test, as another run of its model is"}


def test_a_training_that_is_shorter_than_a_log_interval(copies):
    """fairseq logs its epochs only."""
    log = copies / "hash5" / "train.log"
    (epoch,) = raw(copies / "hash5", "train")
    without(log, "| train_inner |")
    assert reasons(copies) == (list(NAMES), {})
    (values,) = load_run(copies / "hash5").training.intervals.values()
    for key in ("wps", "ppl", "layer1_load_max"):
        assert values[key] == float(epoch[f"train_{key}"])


EPOCHS = {"optimization.max_update": 0, "optimization.max_epoch": 3}
STOPPED = "[2026-01-02 03:30:00,123][fairseq_hash.seams.stopping][INFO] - stopped by SIGTERM at update 4; saved"
CRASHED = "Traceback (most recent call last):\n  File\nOSError: [Errno 28] No space left on device"


@pytest.mark.parametrize(
    ("options", "end", "age", "reason"),
    [
        ({}, "", 30, r"its training is at update 4 of 8: its log grew \d+ s ago, so it seems to run still"),
        ({"optimization.max_update": 4}, "", 30, r"its training is at update 4 of 4: its log grew \d+ s ago, so it .*"),
        ({"optimization.max_update": 4}, "", 1e4, r"its training did not end after update 4, its last one, and its .*"),
        (EPOCHS, "", 1e4, r"its training broke off at update 4 \(3 epochs are wanted\), and its log has not .*"),
        (
            {},
            STOPPED,
            1,
            "its training was stopped by SIGTERM at update 4 of 8; its command, given again, goes on from its last .*",
        ),
        ({}, CRASHED, 1, r"its training failed at update 4 of 8: OSError: \[Errno 28\] No space left on device"),
        ({}, "fairseq_hash: no room", 1, "its training failed at update 4 of 8: fairseq_hash: no room"),
    ],
)
def test_how_a_training_ended(tmp_path, options, end, age, reason):
    """A log that grew within ten minutes and ends with no error is that of a running training."""
    run = write_run(tmp_path / "run", options={"optimization.max_update": 8, **options})
    log = run / "rank0.log"
    log.write_text(re.sub(".*done training.*\n", "", log.read_text()) + (f"{end}\n" if end else ""))
    os.utime(log, (time.time() - age,) * 2)
    _, left_out = reasons(tmp_path, ["run"])
    assert re.fullmatch(reason, left_out["run"]), left_out["run"]


def test_resumed_with_other_options(copies):
    edit(copies / "dense6" / "train.log", "'clip_norm': 0.5", "'clip_norm': 0.25", 1)
    _, left_out = reasons(copies)
    assert left_out == {"dense6": "resumed with other options: optimization.clip_norm"}


def test_resumed_with_other_places(copies):
    """Folders and ways to log may change."""
    for old, new in (("'save_dir': '", "'save_dir': '/elsewhere"), ("'log_interval': 1,", "'log_interval': 5,")):
        edit(copies / "dense6" / "train.log", old, new, 1)
    assert reasons(copies)[1] == {}


def test_the_same_seed_twice(copies):
    shutil.copytree(copies / "hash5", copies / "again")
    compared, left_out = reasons(copies, [*NAMES, "again"])
    assert compared == list(NAMES)
    assert left_out == {"again": f"same options and seed as {copies / 'hash5'}"}


def test_other_data_by_its_fingerprint(copies):
    for name in NAMES:
        (copies / name / "run.json").write_text(json.dumps({"data_fingerprint": "b" * 64}))
    assert reasons(copies)[1] == {}
    (copies / "hash5" / "run.json").write_text(json.dumps({"data_fingerprint": "a" * 64}))
    assert reasons(copies)[1] == {"hash5": f"the data fingerprint is {'a' * 12}, in the other runs {'b' * 12}"}


def sessions(folder):
    """Return a log's text as that of its sessions."""
    text = (folder / "train.log").read_text()
    second = text.rindex("| fairseq_cli.train | {")
    start = text.rindex("\n", 0, second) + 1
    return text[:start], text[start:]


def test_a_file_a_session(copies):
    """Sessions come in the order of their time, not of the files' names; `.out` is what SLURM writes."""
    whole = load_run(copies / "dense6").training
    first, second = sessions(copies / "dense6")
    (copies / "dense6" / "train.log").unlink()
    (copies / "dense6" / "job-9.out").write_text(first)
    (copies / "dense6" / "job-10.out").write_text(second)
    (copies / "dense6" / "notes.txt").write_text(re.sub(r"(?m)^20\d\d", "2101", first))
    assert load_run(copies / "dense6").training == whole


def test_a_session_in_two_files(copies):
    """A redirection and a launcher's own file; and training and evaluations in one file."""
    whole = load_run(copies / "dense6")
    logs = [copies / "dense6" / f"{name}.log" for name in ("train", "eval-valid", "eval-test")]
    (copies / "dense6" / "job.out").write_text("".join(log.read_text() for log in logs))
    assert load_run(copies / "dense6") == whole
    for path in (copies / "dense6").glob("*.log"):
        path.unlink()
    assert load_run(copies / "dense6") == whole


def test_the_last_evaluation_counts(copies):
    """A repeated one, in a file of its own whose name comes first."""
    again = (copies / "hash5" / "eval-test.log").read_text()
    again = re.sub(r"(?m)^20\d\d", "2101", again).replace("Perplexity: ", "Perplexity: 1")
    (copies / "hash5" / "a.log").write_text(again)
    before = perplexity(copies / "hash5", "test")
    assert load_run(copies / "hash5").evaluations["test"].perplexity == float(f"1{before}")


def refused(*folders):
    with pytest.raises(UserError) as caught:
        load_runs(folders)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals(copies, tmp_path):
    run, other = copies / "dense5", copies / "hash5"
    assert refused(run, other, copies / "." / "dense5").startswith(f"{run} was given twice; ")
    (tmp_path / "link").symlink_to(run)
    assert refused(run, tmp_path / "link").startswith(f"{tmp_path / 'link'} was given twice; ")
    assert refused(tmp_path / "none").startswith(f"{tmp_path / 'none'} is not a folder; ")
    assert refused(run / "train.log").startswith(f"{run / 'train.log'} is not a folder; ")
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").startswith(f"{tmp_path / 'empty'} holds no log, and no folder ")
    (tmp_path / "empty" / "train.log").touch()
    assert refused(tmp_path / "empty").startswith(f"{tmp_path / 'empty'} holds no training log (train.log), nor ")
    (run / "run.json").write_text('{"data": ')
    assert refused(run).startswith(f"cannot read {run / 'run.json'} (")


def test_runs_of_two_dictionaries_are_refused(copies):
    """Perplexities per token of different dictionaries do not compare."""
    edit(copies / "hash5" / "train.log", '"dictionary_fingerprint": "', '"dictionary_fingerprint": "9')
    message = refused(copies / "dense5", copies / "hash5")
    assert re.fullmatch(r".*/dense5 and .*/hash5 have different dictionaries \(\w{12} and 9\w{11}\), so .*", message)
