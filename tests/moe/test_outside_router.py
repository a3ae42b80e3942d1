"""A router from outside (`support/outside_router`, 30 lines) is trained, logged and reported as ours are."""

import re
from dataclasses import dataclass
from pathlib import Path

import counting_router
import outside_router
import pandas as pd
import pytest
import ranks
import recorded
import torch
from exactness import SUBSETS, TOLERANCE, one_process, relative, whole
from fairseq import checkpoint_utils
from plugin import command, records, train_arguments

from fairseq_hash.core.errors import UserError
from fairseq_hash.export.config import _check_exportable
from fairseq_hash.moe.routers import register_router, statistic
from fairseq_hash.options.sparse_options import SparseOptions
from fairseq_hash.reporting.report import write_report

LAYERS = ("--sparse-layers", "0,1", "--num-experts", "4")
EXACT = (*LAYERS, "--clip-norm", "0.2", "--optimizer", "sgd", "--lr", "0.5", *SUBSETS)


def test_by_the_real_command_its_statistics_are_in_log_and_report(data, tmp_path):
    assert len(Path(outside_router.__file__).read_text().splitlines()) <= 30
    folder = str(Path(outside_router.__file__).parent)
    arguments = train_arguments(data, tmp_path / "run", *LAYERS, "--router", "random_top2", "--user-dir", folder)
    done = command("train", *arguments)
    (tmp_path / "run" / "train.log").write_text(done.stdout + done.stderr)
    logged = records(done, "train_inner")
    assert len(logged) == 8
    for record in logged:
        assert float(record["layer0_score_margin"]) > 0 and float(record["layer1_load_max"]) >= 1
    record = re.search(r"model_record \| (.*)", done.stdout + done.stderr)[1]
    assert '"router": "random_top2"' in record
    write_report([tmp_path / "run"], tmp_path / "report", "A title")
    [run] = pd.read_csv(tmp_path / "report" / "runs.csv").to_dict("records")
    settled = logged[1:]
    for layer in (0, 1):
        mean = sum(float(record[f"layer{layer}_score_margin"]) for record in settled) / len(settled)
        assert run[f"layer{layer}_score_margin_train"] == pytest.approx(mean, rel=1e-6)
    assert "| Score margin |" in (tmp_path / "report" / "results.md").read_text()


def test_two_ranks_train_as_one(data):
    """Every loss, norm, gradient and parameter, as for the routers of the package (`end_to_end/test_exactness.py`)."""
    arguments = (*EXACT, "--router", "random_top2")
    many = ranks.run(2, "counting_router:train", str(data), arguments)
    alone = recorded.train(data, one_process(arguments, 2))
    for what in ("loss", "norm"):
        assert many[0][what] == pytest.approx(alone[what], rel=TOLERANCE), what
    for name, value in alone["parameters"].items():
        assert relative(whole(many, lambda record: record["parameters"], name), value) <= TOLERANCE, name


@pytest.mark.parametrize("update_freq", ["1", "2"])
def test_state_is_updated_with_the_tokens_of_all_ranks(data, update_freq):
    """Dummy batches and validation left out; on every rank the same."""
    arguments = (*EXACT, "--router", "counting", "--update-freq", update_freq)
    made = ranks.run(2, "counting_router:count", str(data), arguments, 15)
    for layer in (0, 1):
        seen_UE = sum(seen[layer] for _, seen in made)
        assert seen_UE.sum(dim=1).min() > 0
        for counted, _ in made:
            assert torch.equal(counted[layer], seen_UE)


def test_state_survives_a_checkpoint(data, tmp_path):
    arguments = (*EXACT, "--router", "counting", "--save-dir", str(tmp_path))
    trainer, epoch_itr = recorded.make_trainer(data, arguments)
    recorded.run(trainer, epoch_itr, 3)
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, 1.0)
    resumed, _ = recorded.make_trainer(data, arguments)
    one, other = (each.get_model().decoder.layers[0].sparse.router.chosen_UE for each in (trainer, resumed))
    assert torch.equal(one, other) and one[:3].sum(dim=1).min() > 0


def test_another_criterion_does_not_count(data):
    with pytest.raises(SystemExit, match="--criterion cross_entropy does not count tokens per expert"):
        recorded.make_trainer(data, (*EXACT, "--router", "counting", "--criterion", "cross_entropy"))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("switch", "a router 'switch' is there already; give the new one another name"),
        ("hash", "a router 'hash' is there already"),
        ("a|b", "'a|b' cannot be a router's name; use small letters, digits, _ and -"),
        ("Mine", "'Mine' cannot be a router's name"),
    ],
)
def test_names_that_are_refused(name, line):
    with pytest.raises(UserError, match=re.escape(line)):
        register_router(name)


def test_a_statistic_of_a_name_that_every_layer_logs_is_refused():
    @dataclass(frozen=True)
    class Wrong:
        load_max: torch.Tensor = statistic("")

    with pytest.raises(UserError, match="a statistic of the router 'wrong' is called load_max, as one of every layer"):
        register_router("wrong")(type("Router", (), {"statistics": Wrong}))


def test_an_unknown_router_is_named_with_those_that_are_there(data):
    with pytest.raises(SystemExit, match="--router top3.*none, hash, base, .*switch, random_top2, counting"):
        recorded.make_trainer(data, (*EXACT, "--router", "top3"))
    assert counting_router.Counting.top_k == 2


def test_the_export_refuses_it():
    with pytest.raises(
        UserError, match="a.pt has --router random_top2; the exported model has none, hash, switch, base"
    ):
        _check_exportable("a.pt", {}, SparseOptions(router="hash,random_top2", sparse_layers="0,1"))


def test_a_loss_weight_that_is_no_option_is_refused(data, monkeypatch):
    @dataclass(frozen=True)
    class Wrong:
        score_margin: torch.Tensor = statistic("", loss_weight="balance_weight")

    monkeypatch.setattr(outside_router.RandomTop2, "statistics", Wrong)
    with pytest.raises(SystemExit, match="score_margin of Wrong has the weight 'balance_weight', which is no option"):
        recorded.make_trainer(data, (*EXACT, "--router", "random_top2"))
