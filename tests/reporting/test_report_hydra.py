"""Reports on runs as Hydra makes them: which options make a model, folders below folders, sessions on other ranks."""

import shutil

import pytest
from made_runs import edit, write_run

from fairseq_hash.core.errors import UserError
from fairseq_hash.reporting.compare import sort_out
from fairseq_hash.reporting.comparison import compare
from fairseq_hash.reporting.folders import find_runs
from fairseq_hash.reporting.naming import group_by_model
from fairseq_hash.reporting.run_options import stable
from fairseq_hash.reporting.runs import load_run, load_runs

EXPERIMENT = {
    "name": "Hash 1x4",
    "table": "reddit",
    "vocabulary": 100,
    "corpus": "a corpus",
    "published": {"valid": "23.16 A"},
}


def models(*folders):
    """Return the names of the compared runs' folders by model, and the reasons of the others by the folder's name."""
    compared, reasons = sort_out(load_runs(folders))
    groups = group_by_model(compared)
    found = {name: [run.folder.name for run in runs] for name, runs in groups.items()}
    return found, {path.name: reason for path, reason in reasons.items()}


def test_what_is_no_option_of_a_model():
    """By hand: names, places, ranks and the architecture's name; what Hydra logs as a reference is what it names."""
    config = {
        **{"experiment.name": "A", "experiment.published.valid": "1 A", "job_logging_cfg.root.level": "INFO"},
        **{"distributed_training.distributed_world_size": 4, "distributed_training.nprocs_per_node": 2},
        **{"distributed_training.distributed_num_procs": 1, "distributed_training.distributed_no_spawn": True},
        **{"bmuf.distributed_world_size": 4, "scoring": None, "model._name": "hash_transformer_lm_tiny"},
        **{"common.seed": 1, "common.cpu": True, "optimizer._name": "adam", "task.tokens_per_sample": 16},
        **{"model.tokens_per_sample": "${task.tokens_per_sample}", "model.add_bos_token": "${task.add_bos_token}"},
    }
    assert stable(config) == {
        **{"common.cpu": True, "optimizer._name": "adam", "task.tokens_per_sample": 16},
        **{"model.tokens_per_sample": 16, "model.add_bos_token": "${task.add_bos_token}"},
    }


def test_how_ranks_add_up_is_no_option_but_where_each_goes_its_own_way():
    assert stable({"distributed_training.ddp_backend": "legacy_ddp"}) == {}
    own_way = {"distributed_training.ddp_backend": "slowmo"}
    assert stable(own_way) == own_way


@pytest.mark.parametrize(
    ("update_freq", "ranks", "meant_for", "batches"),
    [([1], 1, None, [1]), ([2], 4, None, [8]), ([2], 4, 0, [8]), ([2], 4, 8, [16]), ([4, 1], 2, 1, [4, 1])],
)
def test_batches_of_an_update(update_freq, ranks, meant_for, batches):
    """`--update-freq` times ranks, or times those that `--update-freq-ranks` names."""
    config = {"optimization.update_freq": update_freq, "distributed_training.distributed_world_size": ranks}
    config |= {} if meant_for is None else {"criterion.update_freq_ranks": meant_for}
    assert stable(config) == {"update_freq x ranks": batches}


def test_the_same_options_by_flags_and_by_hydra(tmp_path):
    """One model with two seeds; the experiment's name is known from either."""
    by_flags = {"model._name": "hash_transformer_lm_tiny", "common.seed": 2, "scoring.pad": 1}
    write_run(tmp_path / "flags", options=by_flags)
    write_run(tmp_path / "hydra", EXPERIMENT)
    assert models(tmp_path / "flags", tmp_path / "hydra") == ({"Hash 1x4": ["flags", "hydra"]}, {})


def test_models_are_named_by_their_experiments(tmp_path):
    """Two models of one name are told apart by what differs, each value once; an oracle says that it is one."""
    for seed, experts in enumerate((4, 8, 8)):
        options = {"common.seed": seed, "optimizer.lr": [experts], "optimization.lr": [experts]}
        write_run(tmp_path / f"{seed}", EXPERIMENT, options, num_experts=experts)
    write_run(tmp_path / "dense", EXPERIMENT | {"name": "Dense"}, router="none")
    write_run(tmp_path / "oracle", EXPERIMENT | {"name": "Future"}, hash_feature="future", router="hash,switch")
    chosen = {"router": "expert-choice", "oracle": "--router expert-choice"}
    write_run(tmp_path / "chosen", EXPERIMENT | {"name": "Chosen"}, **chosen)
    expected = {"Hash 1x4 num_experts=4 lr=[4]": ["0"], "Hash 1x4 num_experts=8 lr=[8]": ["1", "2"]}
    expected |= {"Dense": ["dense"], "Future (oracle: sees the next token)": ["oracle"]}
    expected |= {"Chosen (oracle: sees the next token)": ["chosen"]}
    assert models(tmp_path) == (expected, {})


def second_session(folder, old, new):
    """Change the configuration of the last session, and nothing before it."""
    log = folder / "rank0.log"
    head, found, tail = log.read_text().rpartition("[fairseq_cli.train][INFO] - {")
    assert old in tail
    log.write_text(head + found + tail.replace(old, new))


def test_a_preempted_run_is_one_run(tmp_path):
    """Two sessions: on other ranks with the same batch, and stopped by a signal in between."""
    run = write_run(tmp_path / "run", EXPERIMENT, {"optimization.update_freq": [2]}, sessions=2)
    lines = (run / "rank0.log").read_text().splitlines(keepends=True)
    stop = "[2026-01-02 03:00:11,000][fairseq_hash.seams.stopping][INFO] - stopped by SIGTERM at update 4; saved it\n"
    (run / "rank0.log").write_text("".join([*lines[:12], stop, *lines[12:]]))
    second_session(run, "'update_freq': [2]", "'update_freq': [1]")
    second_session(run, "'distributed_world_size': 1", "'distributed_world_size': 2")
    assert models(run) == ({"Hash 1x4": ["run"]}, {})
    assert load_run(run).training.stopped_by is None
    write_run(tmp_path / "other", EXPERIMENT, {"optimization.update_freq": [2], "common.seed": 2})
    assert models(run, tmp_path / "other") == ({"Hash 1x4": ["run", "other"]}, {})
    (run / "rank0.log").write_text("".join([*lines[:12], stop]))
    again = "its command, given again, goes on from its last checkpoint"
    assert models(tmp_path)[1] == {"run": f"its training was stopped by SIGTERM at update 4 of 4; {again}"}


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("'seed': 1", "'seed': 2", "common.seed"),
        ("'distributed_world_size': 1", "'distributed_world_size': 2", "update_freq x ranks"),
        ("'num_experts': 4", "'num_experts': 8", "model.num_experts"),
    ],
)
def test_a_run_that_became_another_is_listed(tmp_path, old, new, key):
    run = write_run(tmp_path / "run", EXPERIMENT, sessions=2)
    write_run(tmp_path / "whole", EXPERIMENT, {"common.seed": 2})
    second_session(run, old, new)
    assert models(tmp_path) == ({"Hash 1x4": ["whole"]}, {"run": f"resumed with other options: {key}"})


def test_a_run_resumed_on_other_ranks_for_the_same_batch(tmp_path):
    """With --update-freq-ranks the same --update-freq is the same batch."""
    run = write_run(tmp_path / "run", EXPERIMENT, {"criterion.update_freq_ranks": 2}, sessions=2, ranks=2)
    second_session(run, "'distributed_world_size': 2", "'distributed_world_size': 1")
    assert models(run) == ({"Hash 1x4": ["run"]}, {})


def test_other_data_and_missing_evaluations_by_hydra(tmp_path):
    for name, seed in (("a", 1), ("b", 2), ("c", 3), ("d", 4)):
        write_run(tmp_path / name, EXPERIMENT, {"common.seed": seed})
    edit(tmp_path / "b" / "eval-test.log", "Evaluated 900", "Evaluated 901")
    (tmp_path / "c" / "eval-valid.log").unlink()
    reasons = {"b": "the number of test tokens is 901, in the other runs 900"}
    reasons["c"] = "not evaluated on valid, as another run of its model is"
    assert models(tmp_path) == ({"Hash 1x4": ["a", "d"]}, reasons)


def test_run_folders_below(tmp_path):
    """At any depth, seed2 before seed10; not in a launcher's or a hidden folder, not inside a run, not by links."""
    for place in ("b/x/seed10", "b/x/seed2", "a", "a/inside", "b/slurm/7", ".hydra/c", "b/x/seed2/rank1.d"):
        write_run(tmp_path / "runs" / place, ranks=2)
    (tmp_path / "runs" / "evaluated").mkdir()
    shutil.copy(tmp_path / "runs" / "a" / "eval-test.log", tmp_path / "runs" / "evaluated")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "runs")
    found = [str(path.relative_to(tmp_path / "runs")) for path in find_runs([tmp_path / "runs"])]
    assert found == ["a", "b/x/seed2", "b/x/seed10"]
    assert find_runs([tmp_path / "runs" / "a", tmp_path / "runs" / "b"]) == find_runs([tmp_path / "runs"])


def test_trainings_that_did_not_start_are_named(tmp_path):
    """Their logs are empty, or end with an error before the first line; what holds an evaluation alone is none."""
    write_run(tmp_path / "runs" / "a")
    for name, text in (("empty", ""), ("failed", "fairseq_hash: --num-experts 0 is out of range\n"), ("other", "hm\n")):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "train.log").write_text(text)
    (tmp_path / "runs" / "evaluated").mkdir()
    shutil.copy(tmp_path / "runs" / "a" / "eval-test.log", tmp_path / "runs" / "evaluated")
    assert compare([tmp_path / "runs"], "title").reasons == {
        str(tmp_path / "runs" / "empty"): "its training has written nothing yet (train.log is empty)",
        str(tmp_path / "runs" / "failed"): "its training did not start: fairseq_hash: --num-experts 0 is out of range",
    }


def test_the_other_ranks_logs_are_not_read(tmp_path):
    """They may be cut off anywhere, or be of another session; rank10 is none of rank 1's."""
    run = write_run(tmp_path / "run", EXPERIMENT, ranks=2)
    whole = load_run(run)
    for name in ("rank1.log", "rank10.log"):
        (run / name).write_text((run / "rank0.log").read_text().replace("'seed': 1", "'seed': 3"))
    assert load_run(run) == whole


def test_folders_without_runs_are_refused(tmp_path):
    """In one line that names the folder; a run that is found twice as well."""
    write_run(tmp_path / "runs" / "a")
    (tmp_path / "empty" / "below").mkdir(parents=True)
    for folders, message in (
        ([tmp_path / "empty"], f"{tmp_path / 'empty'} holds no log, and no folder below it a training log; give a "),
        ([tmp_path / "runs", tmp_path / "runs" / "a"], f"{tmp_path / 'runs' / 'a'} was given twice; "),
    ):
        with pytest.raises(UserError) as caught:
            find_runs(folders)
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
