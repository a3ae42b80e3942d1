"""Composing, checking and planning experiments: what is refused, and with which line."""

import re
import shutil
from pathlib import Path

import pytest
from called import call, refused
from hydra_configs import needs_current_hydra

from fairseq_hash.core.errors import UserError
from fairseq_hash.experiments.checks import check_data, check_experiment
from fairseq_hash.experiments.compose import compose, experiment_names
from fairseq_hash.training.shared_experts import scaled_update_freq

CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = needs_current_hydra


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.num_expert=3", "there is no option model.num_expert; near: num_experts"),
        ("+model.num_expert=3", "model.num_expert is no option; near: num_experts"),
        (
            "model.hash_seed=3",
            "no file of this experiment names model.hash_seed; give it with a plus: +model.hash_seed",
        ),
        ("common.sed=3", "there is no option common.sed; near: seed"),
        ("+common.sed=3", "there is no option common.sed; near: seed"),
        ("+optimizer.adam_beta=3", "there is no option optimizer.adam_beta; near: adam_betas"),
        ("+colour=3", "colour is not a group of options; the groups are"),
        ("router=hush", "Could not find 'router/hush', Available options in 'router': base, dense, "),
        ("optimization.max_update=many", "Value 'many' of type 'str' could not be converted to Integer"),
        ("model.num_experts=many", "Value 'many' of type 'str' could not be converted to Integer"),
        ("model.num_experts=[", "no viable alternative at input '['"),
    ],
)
def test_what_does_not_compose_is_named_in_one_line(override, line):
    with pytest.raises(UserError) as error:
        compose(CONFIGS, "laptop/hash", [override])
    assert line in str(error.value)
    assert str(error.value).startswith("laptop/hash: ") and "\n" not in str(error.value)


def test_unknown_experiments_and_folders():
    with pytest.raises(UserError, match="has no experiment laptop/hsh; near: laptop/hash"):
        compose(CONFIGS, "laptop/hsh")
    with pytest.raises(UserError, match="nowhere is no folder"):
        compose(Path("nowhere"), "laptop/hash")


def test_shared_files_are_no_experiments():
    """Neither what a table shares, nor the parts that experiments are made of."""
    names = experiment_names(CONFIGS)
    assert "laptop/base" in names and "reddit/hash_1x64" in names
    assert not [name for name in names if "_shared" in name or name.split("/")[0] in ("router", "data", "cluster")]


def test_folders_of_runs():
    """Overrides are in the path, the seed last; where data and the cluster are is no part of an experiment."""
    folder = compose(CONFIGS, "laptop/hash", ["common.seed=4", "task.data=/a/b", "cluster=gpu"]).folder
    assert folder == Path("runs/laptop/hash/seed4")
    folder = compose(CONFIGS, "laptop/hash", ["model.num_experts=8", "router=switch"]).folder
    assert folder == Path("runs/laptop/hash/model.num_experts=8,router=switch/seed1")


def test_data_that_is_not_there(tmp_path, data):
    check_data(str(data), ("train", "valid"))
    with pytest.raises(UserError, match=f"task.data={tmp_path} holds no dict.txt"):
        check_data(str(tmp_path), ("train",))
    with pytest.raises(UserError, match="holds no other.bin"):
        check_data(str(data), ("train", "other"))
    with pytest.raises(UserError, match="task.data= holds no dict.txt"):
        check_data(None, ("train",))


@pytest.mark.parametrize(
    ("name", "overrides", "ranks", "line"),
    [
        ("stablemoe/hash", [], 128, "an update is of 64 batches .* use 1, 2, 4, 8, 16, 32, 64 ranks"),
        (
            "reddit/hash_1x16",
            ["+model.expert_parallel_size=3"],
            2,
            "does not divide both the 2 ranks and the 16 experts",
        ),
        ("laptop/hash", ["task.tokens_per_sample=8192"], 1, "max_tokens=1024 holds no sample of .*8192"),
        ("laptop/hash", ["model.sparse_layers='7'"], 1, "layer 7 does not exist"),
        ("laptop/hash", ["+model.hash_seed=-1"], 1, "--hash-seed -1 is out of range"),
        ("laptop/hash_dispersed", [], 1, "model.hash_table=tables/laptop/dispersed-16.safetensors does not exist"),
        ("laptop/hash_predicted", [], 1, "model.hash_predictor=runs/laptop/dense/seed1/checkpoint_best.pt does not"),
        ("laptop/finetune", ["checkpoint.finetune_from_model=no.pt"], 1, "finetune_from_model=no.pt does not exist"),
    ],
)
def test_what_would_not_start_is_said_before_it_does(name, overrides, ranks, line, data):
    experiment = compose(CONFIGS, name, [f"task.data='{data}'", *overrides])
    with pytest.raises(UserError, match=line):
        check_experiment(experiment, ranks)


def test_what_can_start(data):
    for name, ranks in (("laptop/hash", 1), ("reddit/hash_1x64", 64), ("stablemoe/base", 4)):
        check_experiment(compose(CONFIGS, name, [f"task.data='{data}'"]), ranks)


@pytest.mark.parametrize(
    ("freq", "meant_for", "ranks", "expected"),
    [([8], 32, 32, [8]), ([8], 32, 4, [64]), ([8], 32, 64, [4]), ([1, 2], 4, 2, [2, 4]), ([3], 2, 6, [1])],
)
def test_an_update_has_as_many_batches_on_any_number_of_ranks(freq, meant_for, ranks, expected):
    """F x N batches, whatever W is."""
    assert scaled_update_freq(freq, meant_for, ranks) == expected
    assert [f * ranks for f in expected] == [f * meant_for for f in freq]


def test_an_update_that_ranks_cannot_share():
    with pytest.raises(UserError, match="of 6 batches .* which 4 ranks cannot share; use 1, 2, 3, 6 ranks"):
        scaled_update_freq([3], 2, 4)
    with pytest.raises(UserError, match="use 1, 2 ranks"):
        scaled_update_freq([1, 3], 2, 3)


def test_a_plan_of_another_criterion_and_of_none(tmp_path):
    """Another one has no --update-freq-ranks, so that the batch grows with the ranks; none is one line."""
    folder = tmp_path / "configs"
    shutil.copytree(CONFIGS, folder)
    plan = ("plan", "--config-dir", folder, "--config-name", "laptop/dense", "--ranks", "3")
    base, training = folder / "base.yaml", folder / "training" / "laptop.yaml"
    text = base.read_text()
    base.write_text(re.sub(r"  _name: hash_moe\n  log_expert_loads: true", "  _name: cross_entropy", text))
    training.write_text(re.sub(r"criterion:\n  update_freq_ranks: 1.*\n", "", training.read_text()))
    status, out, _ = call(*plan)
    assert status == 0 and re.search(r"Batch +3,072 tokens", out)
    training.write_text(training.read_text() + "criterion:\n")
    assert "laptop/dense: criterion is empty; give one (criterion: {_name: ...})" in refused(*plan)
    refused(*plan, "optimizer=null")


def test_plan_prints_sizes_and_what_is_missing():
    status, text, _ = call("plan", "--config-dir", CONFIGS, "--config-name", "reddit/hash_1x64", "--ranks", "8")
    assert status == 0 and "637,772,800, of which experts 537,198,592" in text and "108,967,936" in text
    assert "valid 23.16 A, test 23.23 S" in text
    assert "not yet: task.data=data/reddit holds no dict.txt" in text
    # 3 x (2 x products + attention) x 524,288 tokens x 100,000 updates
    assert f"{3 * (217681920 + 4 * 1024 * 512 * 8) * 524288 * 100000:.3g} FLOPs" in text


def test_plan_for_launchers(data):
    """Only what a script needs: a folder, flags, or a status and one line."""
    folder = ("plan", "--config-dir", CONFIGS)
    plan = (*folder, "--config-name", "laptop/hash")
    assert call(*plan, f"task.data='{data}'", "--check")[:2] == (0, "")
    assert "task.data=data/laptop holds no dict.txt" in refused(*plan, "--check")
    assert call(*plan, "common.seed=7", "--run-dir")[:2] == (0, "runs/laptop/hash/seed7\n")
    split = (*plan[:3], "model.num_experts=8", *plan[3:], "--run-dir", "common.seed=3")
    assert call(*split)[:2] == (0, "runs/laptop/hash/model.num_experts=8/seed3\n")
    status, _, error = call(*plan, "--no-such-option")
    assert status == 2 and "unrecognized arguments: --no-such-option" in error
    shows = ((*plan, "--flags"), "--router hash --sparse-layers 1"), ((*folder, "--list"), "laptop/hash\n")
    for words, said in shows:
        status, out, _ = call(*words)
        assert status == 0 and said in out
    assert "--config-name is missing" in refused(*folder)
    assert "--ranks takes a number of 1 or more" in refused(*plan, "--ranks", "0")
