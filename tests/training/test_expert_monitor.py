"""`--monitor-interval`: what it says of the experts is what loops find, on one rank and on two, killed or not."""

import json
import logging
import math
import signal
from pathlib import Path

import forked
import monitor_ranks
import numpy as np
import pytest
import ranks
import recorded
import torch
from exactness import SUBSETS, one_process
from monitor_ranks import same
from plugin import records, train

from fairseq_hash.core.errors import UserError
from fairseq_hash.fairseq_patches.tensorboard import description_of
from fairseq_hash.moe.routing_stats import OF_MONITOR
from fairseq_hash.options.criterion_options import MonitorOptions, monitor_options
from fairseq_hash.parallel.exchange_meter import ExchangeMeter
from fairseq_hash.reporting.comparison_table import router_statistics
from fairseq_hash.reporting.runs import load_run
from fairseq_hash.training.expert_alarm import ExpertAlarm
from fairseq_hash.training.expert_summary import logged, summary
from fairseq_hash.training.monitor_file import NAME, MonitorFile

SPARSE = ("--num-experts", "4", "--sparse-layers", "0,1", "--clip-norm", "0.2", *SUBSETS)
CASES = {
    "switch": ("--router", "switch", "--capacity-factor", "1.0", *SPARSE),
    "hash": ("--router", "hash", "--capacity-factor", "1.5", *SPARSE),
    "hash of two tables": ("--router", "hash", "--hash-per-layer", *SPARSE),
    "replicas": ("--router", "hash", "--expert-placement", "balanced", "--expert-replicas", "2", *SPARSE),
    "multi": ("--router", "hash", "--multi-hash", "2", "--capacity-factor", "1.0", *SPARSE),
    "topk": ("--router", "topk", "--experts-per-token", "2", "--capacity-factor", "1.0", *SPARSE),
    "base": ("--router", "base", "--sparse-placement", "insert", *SPARSE),
    "checkpointed": ("--router", "switch", "--capacity-factor", "1.0", "--checkpoint-activations", *SPARSE),
}
SHARED = ("switch", "hash", "hash of two tables", "replicas")
EVERY_2 = ("--monitor-interval", "2")
UPDATES = 4
TIMES = ("exchange_seconds", "exchange_seconds_mean")


@pytest.fixture(scope="module")
def one_and_two(data, tmp_path_factory):
    """Each case in one process and on two ranks, with the same batches."""
    folder = tmp_path_factory.mktemp("monitored")
    result = {}
    for name in SHARED:
        alone, shared = monitor_ranks.folders(folder, f"{name} alone", f"{name} shared")
        words = (*CASES[name], *EVERY_2)
        one = monitor_ranks.monitored(str(data), one_process(words, 2), UPDATES, alone)
        result[name] = one, ranks.run(2, "monitor_ranks:monitored", str(data), words, UPDATES, shared)
    return result


def check(lines, seen_of_ranks):
    """Compare the records with what a loop saw on each rank."""
    layers = len(seen_of_ranks[0][1]["weight"])
    assert [(line["update"], line["layer"]) for line in lines] == [(u, n) for u in (2, 4) for n in range(layers)]
    for line in lines:
        update, place = line["update"], line["layer"]
        of_update = [seen[update] for seen in seen_of_ranks]
        for what in ("gradient", "weight"):
            held = {e: v for one in of_update for e, v in zip(one["experts"], one[what][place], strict=True)}
            assert same(line[f"{what}_norm"], [held[expert] for expert in sorted(held)])
        chosen, dropped = np.sum([one for seen in of_update for one in seen["chosen"][place]], axis=0)
        assert same(line["drop"], dropped / chosen.clip(min=1))
        window = [one for seen in seen_of_ranks for u in (update - 1, update) for one in seen[u]["chosen"][place]]
        chosen, dropped = np.sum(window, axis=0)
        assert same(line["load"], chosen / chosen.sum()) and line["updates"] == 2
        assert same([line["dropped"]], [dropped.sum() / chosen.sum()])
        check_summary(line)


def check_summary(line):
    """Compare the numbers of all experts together with NumPy and the formulas."""
    relative = np.array(line["load"]) / np.mean(line["load"])
    assert same([line[f"load_p{q}"] for q in (10, 50, 90)], np.quantile(relative, (0.1, 0.5, 0.9)))
    entropy = -sum(share * math.log(share) for share in line["load"] if share) / math.log(len(line["load"]))
    assert same([line["load_entropy"]], [entropy])
    assert line["dead_experts"] == sum(value < 0.01 for value in relative)
    assert line["drop_max"] == max(line["drop"])
    for what in ("gradient_norm", "weight_norm"):
        expected = np.quantile(line[what], (0, 0.1, 0.5, 0.9, 1))
        assert same([line[f"{what}_{name}"] for name in ("min", "p10", "p50", "p90", "max")], expected)


@pytest.mark.parametrize("name", ["switch", "topk", "base", "multi", "checkpointed"])
def test_measures_what_loops_find(data, name, tmp_path):
    done = monitor_ranks.monitored(str(data), (*CASES[name], *EVERY_2), UPDATES, str(tmp_path))
    check(done["lines"], [done["seen"]])
    assert all(line["exchange_seconds"] == line["exchange_bytes"] == 0 for line in done["lines"])
    if name in ("switch", "topk", "multi", "checkpointed"):
        assert max(line["drop_max"] for line in done["lines"]) > 0


@pytest.mark.parametrize("name", SHARED)
def test_two_ranks_agree_with_one_process(one_and_two, name):
    alone, shared = one_and_two[name]
    check(alone["lines"], [alone["seen"]])
    check(shared[0]["lines"], [one["seen"] for one in shared])
    for one, other in zip(alone["lines"], shared[0]["lines"], strict=True):
        for key, value in one.items():
            if key.startswith("exchange"):
                continue
            if isinstance(value, str):
                assert value == other[key]
            else:
                assert same(value, other[key]), key


@pytest.mark.parametrize("name", SHARED)
def test_each_layer_counts_its_own_exchange(one_and_two, name):
    """Together they have what the ranks sent in that update, though hash layers share a plan."""
    _, shared = one_and_two[name]
    for update in (2, 4):
        lines = [line for line in shared[0]["lines"] if line["update"] == update]
        assert sum(line["exchange_bytes"] for line in lines) == sum(one["seen"][update]["bytes"] for one in shared) > 0
        assert all(line["exchange_bytes"] > 0 and line["exchange_seconds"] > 0 for line in lines)
        assert all(0 < line["exchange_seconds_mean"] <= line["exchange_seconds"] for line in lines)
    if name == "hash":  # one plan for both layers: as many rows
        assert len({line["exchange_bytes"] for line in shared[0]["lines"] if line["update"] == 2}) == 1


@pytest.mark.parametrize("form", [("--bf16",), ("--memory-efficient-bf16",), ("--memory-efficient-fp16",)])
def test_half_precision_scales_gradients_as_fp32_has_them(data, form, tmp_path):
    found = {}
    scale = ("--fp16-init-scale", "4") if "fp16" in form[0] else ()
    for name, more in {"whole": (), "half": (*form, *scale)}.items():
        (folder,) = monitor_ranks.folders(tmp_path, name)
        trainer, epoch_itr = recorded.make_trainer(
            str(data), (*CASES["hash"], "--monitor-interval", "1", "--save-dir", folder, *more)
        )
        recorded.run(trainer, epoch_itr, 2)
        found[name] = [json.loads(line)["gradient_norm"] for line in Path(folder, NAME).read_text().splitlines()]
    np.testing.assert_allclose(found["half"], found["whole"], rtol=0.05)


def test_frozen_experts_have_no_gradient(data, tmp_path):
    words = (*CASES["switch"], "--freeze", "experts", "--monitor-interval", "1", "--save-dir", str(tmp_path))
    trainer, epoch_itr = recorded.make_trainer(str(data), words)
    recorded.run(trainer, epoch_itr, 1)
    line = json.loads((tmp_path / NAME).read_text().splitlines()[0])
    assert line["gradient_norm"] == [None] * 4 and line["gradient_norm_p50"] is None and line["weight_norm_p50"] > 0
    assert "gradient_norm_p50" not in logged(line)


@pytest.mark.parametrize("name", ["hash", "switch"])
def test_between_measurements_the_host_waits_for_nothing_more(data, name):
    without = monitor_ranks.waits(str(data), CASES[name], 4)
    with_it = monitor_ranks.waits(str(data), (*CASES[name], "--monitor-interval", "1000"), 4)
    assert with_it == without


def test_log_tensorboard_and_file_say_the_same(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = (*CASES["switch"], "--monitor-interval", "2", "--log-interval", "2", "--max-update", "4")
    done = train(data, tmp_path, *words, "--tensorboard-logdir", tmp_path / "board", "--no-save")
    lines = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    board = EventAccumulator(str(tmp_path / "board" / "train_inner")).Reload()
    for line in lines:
        (inner,) = [one for one in records(done, "train_inner") if int(one["num_updates"]) == line["update"]]
        for name, value in logged(line).items():
            tag = f"layer{line['layer']}_{name}"
            assert float(inner[tag]) == pytest.approx(value)
            (event,) = [event for event in board.Scalars(tag) if event.step == line["update"]]
            assert event.value == pytest.approx(value)
            assert OF_MONITOR[name] in description_of(tag)
    assert set(logged(lines[0])) == set(OF_MONITOR)
    (tmp_path / "train.log").write_text(done.stdout + done.stderr)
    own = {"router_entropy", "balance_loss", "z_loss"}  # what a report shows as the router's
    assert set(router_statistics(load_run(tmp_path), 1)) == own


class Event:
    """What stands for a CUDA event: it has a time once the device has come to it, which somebody waited for."""

    said = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = len(self.said)
        self.said.append("recorded")

    def synchronize(self):
        self.said.append("waited")

    def elapsed_time(self, end):
        assert self.said[-1] == "waited"
        return 500.0 * (end.at - self.at)


def test_on_a_gpu_the_time_lies_between_events_and_nothing_waits_before_it_is_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    meter = ExchangeMeter()
    for size in (100, 20):
        with meter.exchange(size, torch.device("cuda")):
            pass
    assert Event.said == ["recorded"] * 4 and meter.bytes == 120
    assert meter.seconds() == 1.0 and Event.said[4:] == ["waited"]


def without_times(lines):
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def test_a_killed_training_goes_on_in_its_file(data, tmp_path):
    """Killed in update 6, after a checkpoint of update 3; another one's last line is cut off as well."""
    whole, killed = monitor_ranks.folders(tmp_path, "whole", "killed")
    words = (*CASES["switch"], "--monitor-interval", "1")
    monitor_ranks.experiment(str(data), (*words, "--save-dir", whole), 7)
    arguments = (str(data), (*words, "--save-dir", killed), 3, 5)
    process = forked.start(monitor_ranks.train_and_die, arguments, tmp_path / "said", OMP_NUM_THREADS="1")
    process.join(300)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "said").read_text()[-2000:]
    path = Path(killed) / NAME
    lines = path.read_text().splitlines(keepends=True)
    assert [json.loads(line)["update"] for line in lines] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    path.write_text("".join(lines) + lines[0][:40])
    monitor_ranks.experiment(str(data), (*words, "--save-dir", killed), 7)
    texts = [(Path(folder) / NAME).read_text() for folder in (killed, whole)]
    found, expected = ([json.loads(line) for line in text.splitlines()] for text in texts)
    assert without_times(found) == without_times(expected) and len(found) == 14


def test_the_file_keeps_whole_lines_up_to_an_update(tmp_path, caplog):
    file = MonitorFile(tmp_path / "new")
    assert file.resume(0) == []
    made = [record(update, [0.5, 0.5]) for update in (1, 2, 3)]
    file.append(made[:2])
    file.append(made[2:])
    text = file.path.read_text()
    assert file.resume(3) == made and file.path.read_text() == text
    file.path.write_bytes(b'{"update": 9}\n\xff\n[]\n' + text.encode() + text[:20].encode())
    with caplog.at_level(logging.INFO):
        assert file.resume(2) == made[:2]
    assert file.path.read_text() == "".join(text.splitlines(keepends=True)[:2])
    assert "2 of 7 lines stay; the others are of updates after 2" in caplog.text
    assert not list(tmp_path.rglob("*.partial"))


def test_a_file_that_cannot_be_written_ends_no_training(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    MonitorFile(tmp_path / "file").append([record(1, [1.0])])
    assert "this measurement is in the log only" in caplog.text


def record(update, load, router="switch", layer=1, dropped=0.0):
    return {"update": update, "layer": layer, "router": router, "dropped": dropped, "load": load}


EVEN, DEAD, FULL = [0.25] * 4, [0.001, 0.333, 0.333, 0.333], [0.1, 0.1, 0.1, 0.7]


def heard(alarm, loads, **more):
    """Return how many lines each measurement gave rise to."""
    return [len(alarm.hear(record(number, load, **more))) for number, load in enumerate(loads)]


def test_warns_when_it_has_lasted_and_once():
    assert heard(ExpertAlarm(3, 2.0), [EVEN] * 5) == [0] * 5
    assert heard(ExpertAlarm(3, 2.0), [DEAD] * 5) == [0, 0, 1, 0, 0]
    assert heard(ExpertAlarm(3, 2.0), [DEAD, DEAD, EVEN, DEAD, DEAD, DEAD]) == [0, 0, 0, 0, 0, 1]
    assert heard(ExpertAlarm(1, 2.0), [DEAD, EVEN, DEAD]) == [1, 0, 1]
    assert heard(ExpertAlarm(2, 2.0), [FULL] * 3) == [0, 1, 0]
    assert heard(ExpertAlarm(2, 2.8), [FULL] * 3) == [0] * 3  # 2.8 is not more than 2.8
    assert heard(ExpertAlarm(1, 2.0), [[0.0] * 4]) == [0]  # no token at all


def test_layers_and_kinds_count_for_themselves():
    alarm = ExpertAlarm(2, 2.0)
    assert heard(alarm, [DEAD], layer=1) == [0] and heard(alarm, [DEAD], layer=3) == [0]
    assert heard(alarm, [[0.0, 0.1, 0.1, 0.8]], layer=1) == [1]  # dead again, full for the first time
    assert heard(alarm, [[0.0, 0.1, 0.1, 0.8]], layer=1) == [1]


@pytest.mark.parametrize(
    ("router", "remedy"),
    [
        ("hash", "--hash-table balanced or scattered"),
        ("switch", "raise --load-balance-weight"),
        ("topk", "raise --bias-step"),
        ("mine", "balance this router"),
    ],
)
def test_a_warning_says_what_helps(router, remedy):
    alarm = ExpertAlarm(1, 2.0)
    (line,) = alarm.hear(record(40, DEAD, router=router))
    assert line.startswith(f"layer 1 ({router}), update 40: expert 0 of 4 got less than 0.01 of the mean load in 1 ")
    assert remedy in line and "\n" not in line
    (line,) = alarm.hear(record(41, FULL, router=router, dropped=0.125))
    assert "expert 3 of 4 got more than 2 times the mean load (now 2.8)" in line
    assert remedy in line and "a larger --capacity-factor drops fewer tokens (12.5% now)" in line


def test_many_experts_are_named_in_part():
    load = [0.0] * 20 + [0.05] * 20
    (line,) = ExpertAlarm(1, 3.0).hear(record(1, load))
    assert "experts 0, 1, 2, 3, 4, 5, 6, 7, ... of 40 got less" in line


def test_a_training_warns_and_a_resumed_one_goes_on_counting(data, tmp_path, caplog):
    """Each load above 1.0001 of the mean counts; three measurements lie in the first session, two in the second."""
    words = (*CASES["hash"], "--monitor-interval", "1", "--monitor-overload", "1.0001", "--save-dir", str(tmp_path))
    for patience, warns in ((6, False), (5, True)):
        (tmp_path / NAME).unlink(missing_ok=True)
        caplog.clear()
        more = (*words, "--monitor-patience", str(patience))
        monitor_ranks.experiment(str(data), more, 3)
        assert "measurements in a row" not in caplog.text
        trainer, epoch_itr = recorded.make_trainer(str(data), more)
        trainer.set_num_updates(3)
        recorded.run(trainer, epoch_itr, 5)
        assert ("got more than 1.0001 times the mean load" in caplog.text) == warns
        assert caplog.text.count("measurements in a row") == (2 if warns else 0)  # once a layer


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ((-1, 5, 3.0), "--monitor-interval -1 is out of range; give a number of 0 or more"),
        ((10, 0, 3.0), "--monitor-patience 0 is out of range; give a number of 1 or more"),
        ((10, 5, 1.0), "--monitor-overload 1.0 is out of range; give a number above 1"),
        ((10, 5, float("nan")), "--monitor-overload nan is out of range"),
        ((0, 6, 3.0), "--monitor-patience 6 does nothing without --monitor-interval; give one, or leave it out"),
        ((0, 5, 4.0), "--monitor-overload 4.0 does nothing without --monitor-interval"),
    ],
)
def test_options_out_of_range_or_in_vain(values, line):
    with pytest.raises(UserError) as refused:
        monitor_options(*values)
    assert line in str(refused.value)


def test_options_in_range():
    assert monitor_options(0, 5, 3.0) is None and monitor_options(10, 1, 1.5) == MonitorOptions(10, 1, 1.5)


def test_fully_sharded_is_refused(data, tmp_path):
    words = ("--ddp-backend", "fully_sharded", "--use-sharded-state", "--monitor-interval", "1")
    done = ranks.run(1, "monitor_ranks:refused", str(data), (*CASES["hash"], *words))
    assert "--monitor-interval does not go with --ddp-backend fully_sharded" in done[0]


def test_one_expert_is_even():
    line = {**record(1, [1.0]), "drop": [0.0], "gradient_norm": [2.0], "weight_norm": [3.0]}
    assert summary(line)["load_entropy"] == 1.0
