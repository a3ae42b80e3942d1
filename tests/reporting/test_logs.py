"""fairseq_hash.reporting.logs: a hand-written log with its numbers worked out, real logs, and logs cut anywhere."""

import math
import re
from datetime import datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import raw

from fairseq_hash.core.errors import UserError
from fairseq_hash.reporting import logs
from fairseq_hash.reporting.logs import Line, parse_config, parse_line, read_evaluations, read_lines, read_training

# Two sessions: the first is killed in update 3, the second starts from a checkpoint at update 1.
TRAINING = """\
/somewhere/offload.py:19: FutureWarning: `torch.cuda.amp.custom_fwd(args...)` is deprecated.
2026-01-02 03:04:05 | INFO | fairseq_cli.train | {'common': {'seed': 7}, 'optimization': {'lr': [0.5], 'max_update': 3}}
2026-01-02 03:04:05 | INFO | fairseq_hash.model | model_record | {"router": "hash"}
2026-01-02 03:04:06 | INFO | fairseq.trainer | No existing checkpoint found run/checkpoint_last.pt
2026-01-02 03:04:07 | INFO | train_inner | {"ppl": "90.5", "num_updates": "1", "train_wall": "4", "wall": "5"}
2026-01-02 03:04:08 | INFO | train_inner | {"ppl": "80.5", "num_updates": "2", "train_wall": "6", "wall": "7"}
2026-01-02 03:04:08 | INFO | valid | {"epoch": 1, "valid_ppl": "85", "valid_num_updates": "2"}
2026-01-02 03:04:09 | INFO | train_inner | {"epoch": 1, "ppl": "70\
2026-01-02 04:00:00 | INFO | fairseq_cli.train | {'common': {'seed': 7}, 'optimization': {'lr': [0.5], 'max_update': 4}}
2026-01-02 04:00:00 | INFO | fairseq_hash.model | model_record | {"router": "switch"}
2026-01-02 04:00:01 | INFO | fairseq.trainer | Loaded checkpoint run/checkpoint_last.pt (epoch 1 @ 1 updates)
2026-01-02 04:00:02 | INFO | train_inner | {"ppl": "inf", "num_updates": "2", "load": [0.25, 0.75], "wall": "8"}
2026-01-02 04:00:03 | INFO | train_inner | {"ppl": "60.5", "num_updates": "3", "lr": "3e-05", "wall": "9.5"}
2026-01-02 04:00:04 | INFO | valid | {"epoch": 1, "valid_ppl": "65", "valid_num_updates": "3"}
2026-01-02 04:00:05 | INFO | train | {"epoch": 1, "train_ppl": "77", "train_train_wall": "3", "train_wall": "11"}
2026-01-02 04:00:06 | INFO | fairseq_cli.train | done training in 5.9 seconds
"""
EVALUATION = """\
2026-01-02 05:00:00 | INFO | fairseq_cli.eval_lm | {'common_eval': {'path': 'a/b.pt'}, 'dataset': {'gen_subset': test}}
2026-01-02 05:00:01 | INFO | fairseq_hash.model | model_record | {"router": "base"}
2026-01-02 05:00:02 | INFO | fairseq_cli.eval_lm | Evaluated 1,234,567 tokens in 0.9s (664.50 tokens/s)
2026-01-02 05:00:02 | INFO | fairseq_cli.eval_lm | Loss (base 2): 6.5000, Perplexity: 90.51
"""


STOPPED = "stopped by SIGTERM at update 1; the same command goes on from the checkpoint"


def read(text):
    return [line for line in map(parse_line, text.splitlines()) if line]


def test_a_training_of_two_sessions_by_hand():
    """The second session replaces what the first did after update 1, validation included; its time counts from there by
    the clock, 5 seconds at update 1, as fairseq's own stands still after it loaded a checkpoint."""
    log = read_training(read(TRAINING))
    given = {"common.seed": 7, "optimization.lr": [0.5]}
    assert log.configs == [given | {"optimization.max_update": stop} for stop in (3, 4)]
    assert log.config is log.configs[-1]
    assert log.model == {"router": "switch"}
    assert log.intervals == {
        1: {"ppl": 90.5, "num_updates": 1, "train_wall": 4, "wall": 5},
        2: {"ppl": math.inf, "num_updates": 2, "load": [0.25, 0.75], "wall": 6},
        3: {"ppl": 60.5, "num_updates": 3, "lr": 3e-5, "wall": 7},
    }
    assert log.validations == {3: {"epoch": 1, "ppl": 65, "num_updates": 3}}
    assert (log.updates, log.wall_seconds, log.finished) == (3, 9, datetime(2026, 1, 2, 4, 0, 6))


@pytest.mark.parametrize(("session", "seconds"), [(0, 7), (1, 5 + 3)])
def test_the_time_of_a_training_that_a_signal_stops(session, seconds):
    """Also before its first logged line: from its first line on, or from the checkpoint's time on."""
    lines = read(TRAINING)
    headers = [place for place, line in enumerate(lines) if line.message.startswith("{")]
    kept = lines[: headers[session] + 1]
    if session:
        kept.append(next(line for line in lines[headers[1] :] if "Loaded checkpoint" in line.message))
    stop = Line(kept[-1].time + timedelta(seconds=seconds - 5 * session), "fairseq_hash.training.stop_signals", STOPPED)
    assert read_training([*kept, stop]).wall_seconds == seconds


def test_a_session_from_the_start_forgets_all():
    first, second = TRAINING[: TRAINING.index("2026-01-02 04:")] + "\n", TRAINING[TRAINING.index("2026-01-02 04:") :]
    second = second.replace("Loaded checkpoint run/", "No existing checkpoint found run/")
    log = read_training(read(first + second))
    assert list(log.intervals) == [2, 3] and list(log.validations) == [3] and len(log.configs) == 2


def test_a_started_session_is_not_finished():
    log = read_training(read(TRAINING + TRAINING.splitlines()[1]))
    assert log.finished is None and len(log.configs) == 3


def test_what_was_cut_off_in_the_middle_of_a_file_is_none():
    """Another stream's text may stand behind the cut, so no next header tells of it."""
    warning = "/somewhere/offload.py:19: FutureWarning"
    text = TRAINING.replace('{"router": "switch"}', '{"rou' + warning).replace("(epoch 1 @ 1 updates)", "(ep" + warning)
    log = read_training(read(text))
    assert log.model == {"router": "hash"} and list(log.intervals) == [1, 2, 3] and log.finished


def test_an_evaluation_by_hand():
    (one,) = read_evaluations(read(EVALUATION))
    assert (one.subset, one.checkpoint, one.tokens) == ("test", "b.pt", 1234567)
    assert (one.loss_bits, one.perplexity, one.model) == (6.5, 90.51, {"router": "base"})
    assert one.time == datetime(2026, 1, 2, 5)


def test_evaluations_in_one_file_stay_apart():
    """A killed one, one that named no checkpoint, a good one; a training before them is none of them."""
    killed = "".join(EVALUATION.splitlines(keepends=True)[:3])
    nameless = EVALUATION.splitlines(keepends=True)[0].replace("'a/b.pt'", "None")
    found = read_evaluations(read(TRAINING + killed + nameless + EVALUATION))
    assert [one.perplexity for one in found] == [None, None, 90.51]
    assert [one.checkpoint for one in found] == ["b.pt", "", "b.pt"]
    assert read_evaluations(read(TRAINING)) == []


def test_an_evaluation_does_not_change_the_training():
    """It records the model that it loaded: perhaps on another machine, or with another dictionary."""
    assert read_training(read(TRAINING + EVALUATION)) == read_training(read(TRAINING))
    assert read_training(read(EVALUATION)) is None
    again = read_training(read(TRAINING + EVALUATION + TRAINING.replace('"switch"', '"base"')))
    assert again.model == {"router": "base"} and len(again.configs) == 4


@pytest.mark.parametrize(
    ("text", "source", "message"),
    [
        ("2026-01-02 03:04:05 | INFO | train_inner | x | y", "train_inner", "x | y"),
        ("2026-01-02 03:04:05 | WARNING | fairseq.trainer | z", "fairseq.trainer", "z"),
        ("[2026-01-02 03:04:05,678][train_inner][INFO] - x - y", "train_inner", "x - y"),
        ("0: 2026-01-02 03:04:05 | INFO | valid | {}", "valid", "{}"),
        ("Perplexity: 12026-01-02 03:04:05 | INFO | valid | {}", "valid", "{}"),
    ],
)
def test_lines_of_fairseq_and_of_hydra(text, source, message):
    """With a rank before it, as launchers add, or the start of a line that was cut off."""
    assert parse_line(text) == Line(datetime(2026, 1, 2, 3, 4, 5), source, message)


@pytest.mark.parametrize("text", ["", "  (decoder): X(", "2026-01-02 03:04:05 | INFO", "2026-01-02 | INFO | a | b"])
def test_other_lines_are_none_of_a_logger(text):
    assert parse_line(text) is None


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"^cannot read .*train\.log: No such file.*; give a run folder"):
        read_lines(tmp_path / "train.log")


NAMES = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.just(math.inf)
VALUES = st.none() | st.booleans() | NUMBERS | st.text() | st.lists(NUMBERS)


@given(st.dictionaries(NAMES, VALUES | st.dictionaries(NAMES, VALUES, min_size=1), min_size=1))
def test_configurations_come_back(config):
    """What Python prints of nested options, infinity included, is read as the same options with dotted names."""
    expected = {}
    for key, value in config.items():
        inner = value.items() if isinstance(value, dict) else [(None, value)]
        expected.update({key if name is None else f"{key}.{name}": content for name, content in inner})
    assert parse_config(str(config)) == expected


def test_configurations_as_fairseq_prints_them():
    """A choice stands without quotes, a model's options are a Namespace, a tuple becomes a list."""
    text = "{'ddp': {'backend': pytorch_ddp}, 'model': Namespace(lr=[0.1], betas=(0.9, 0.98), top=inf, low=-1)}"
    assert parse_config(text) == {
        **{"ddp.backend": "pytorch_ddp", "model.lr": [0.1], "model.betas": [0.9, 0.98]},
        **{"model.top": math.inf, "model.low": -1},
    }
    assert math.isnan(parse_config("{'a': nan}")["a"])


@pytest.mark.parametrize("text", ["{'a': 1", "{'a': f(1)}", "{'a': 1} b", "{'a': '\0"])
def test_a_configuration_that_is_none(text):
    with pytest.raises(UserError, match="^cannot read a configuration in a log: ") as caught:
        parse_config(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["dense5", "hash5", "switch5"])
def test_a_real_training(made, name):
    """Every number of the log; the values there are text, which float reads here."""
    log = read_training(read_lines(made / name / "train.log"))
    for tag, prefix, found in (("train_inner", "", log.intervals), ("valid", "valid_", log.validations)):
        records = raw(made / name, tag)
        assert [int(record[f"{prefix}num_updates"]) for record in records] == list(found)
        for record, values in zip(records, found.values(), strict=True):
            expected = {key.removeprefix(prefix): value for key, value in record.items()}
            assert values == {key: float(v) if isinstance(v, str) else v for key, v in expected.items()}
    assert list(log.intervals) == list(range(1, 9)) and list(log.validations) == [2, 4, 6, 8]
    assert log.model["router"] == {"dense5": "none"}.get(name, name[:-1])
    assert log.config["common.seed"] == 5 and log.config["optimization.max_update"] == 8
    assert log.config["task.tokens_per_sample"] == 16 and log.config["common.log_format"] == "json"
    assert log.wall_seconds == float(raw(made / name, "train")[-1]["train_wall"])
    end = r"(\S+ \S+) \| INFO \| fairseq_cli.train \| done training"
    stamp = re.search(end, (made / name / "train.log").read_text())
    assert str(log.finished) == stamp[1]


def test_a_real_resumed_training(made):
    """Updates 1 to 6, then from the checkpoint of update 4 on: updates 5 and 6 are those of the second session."""
    records = raw(made / "dense6", "train_inner")
    assert [int(record["num_updates"]) for record in records] == [*range(1, 7), *range(5, 9)]
    log = read_training(read_lines(made / "dense6" / "train.log"))
    assert list(log.intervals) == list(range(1, 9)) and list(log.validations) == [2, 4, 6, 8]
    kept = [*records[:4], *records[6:]]
    assert [values["wps"] for values in log.intervals.values()] == [float(record["wps"]) for record in kept]
    assert [config["optimization.max_update"] for config in log.configs] == [6, 8]


@pytest.mark.parametrize("name", ["train.log", "hydra_train.log"])
def test_a_real_training_by_hydra(made, name):
    """What a user redirected, and what Hydra itself wrote to its folder."""
    log = read_training(read_lines(made / "hydra" / name))
    losses = [float(record["loss"]) for record in raw(made / "hydra", "train_inner")]
    assert [values["loss"] for values in log.intervals.values()] == losses and len(losses) == 2
    assert log.model["router"] == "none" and log.finished and log.config["model.decoder_layers"] == 1
    assert list(log.validations) == [2]


@settings(max_examples=25)
@given(cut=st.floats(0, 1))
def test_a_log_cut_anywhere(made, tmp_path_factory, cut):
    """It tells a part of what the whole log tells, whatever the process was writing; so it does with a next session
    behind the cut, which tells all again."""
    text = (made / "switch5" / "train.log").read_text()
    whole = read_training(read(text))
    text = text[: text.index("done training")]  # the warnings on standard error, which come behind, are none of it
    file = tmp_path_factory.getbasetemp() / "cut.log"
    file.write_text(text[: int(cut * len(text))])
    log = read_training(read_lines(file)) or logs.TrainingLog()
    assert log.finished is None and log.model in (None, whole.model)
    for part, all_of_it in ((log.intervals, whole.intervals), (log.validations, whole.validations)):
        assert list(part.items()) == list(all_of_it.items())[: len(part)]
    start = text.index(" | INFO | fairseq_cli.train | {") - len("2026-01-02 03:04:05")
    with file.open("a") as end:
        end.write((made / "switch5" / "train.log").read_text()[start:])
    again = read_training(read_lines(file))
    assert (again.intervals, again.validations, again.model) == (whole.intervals, whole.validations, whole.model)
    assert again.finished == whole.finished


def test_a_number_cut_off_is_none(copies):
    """Of `Perplexity: 75.23` the first digits are a number as well."""
    file = copies / "switch5" / "eval-test.log"
    assert read_evaluations(read_lines(file))[0].perplexity is not None
    file.write_text(file.read_text().rstrip()[:-1])
    assert read_evaluations(read_lines(file))[0].perplexity is None
