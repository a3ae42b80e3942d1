"""Which runs a study needs next, played through with made-up results."""

from dataclasses import replace

import numpy as np
import pytest

from fairseq_hash.studies.definition import Study, StudyModel, StudyText
from fairseq_hash.studies.records import FINAL, TUNING, RunRecord, Validation
from fairseq_hash.studies.schedule import Run, choose, done_of, expected_runs, wanted

TEXT = StudyText("embedded", 400, 8192, 2048, 2048)


def study_of(*names, **changes):
    models = {name: StudyModel(name, f"laptop/{name}") for name in names}
    given = {"learning_rates": (0.001, 0.002, 0.004), "seeds": (1, 2), "baseline": names[0], "models": models}
    return Study("study", "Title", "Question?", "Limits.", TEXT, **{**given, **changes})


def record(run, nats, diverged=""):
    rest = {"parameters": 1, "active": 1, "experts": 0, "flops_per_token": 1, "tokens": 1, "seconds": 1.0}
    return RunRecord(
        f"{run}", run.model, [], run.learning_rate, run.seed, tokens_per_second=1.0,
        validations=[Validation(1, 1.0, nats)], diverged=diverged, **rest,
    )  # fmt: skip


def play(study, nats_of, order=None):
    """Make wanted runs, one at a time and in any order, until there are none; return all runs."""
    done = {}
    generator = np.random.default_rng(order)
    while runs := wanted(study, done):
        assert len(set(runs)) == len(runs) and not set(runs) & set(done)
        run = runs[0] if order is None else runs[generator.integers(len(runs))]
        result = nats_of(run)
        done[run] = record(run, 0.0, "nan") if result is None else record(run, result)
    return done


def valley(best):
    return lambda run: abs(np.log2(run.learning_rate / best)) + run.seed / 100


@pytest.mark.parametrize(
    ("best", "tried", "at_edge"),
    [
        (0.002, {0.001, 0.002, 0.004}, False),
        (0.001, {0.0005, 0.001, 0.002, 0.004}, False),
        (0.016, {0.001, 0.002, 0.004, 0.008, 0.016, 0.032}, False),
        (1e-6, {0.000125, 0.00025, 0.0005, 0.001, 0.002, 0.004}, True),
        (9.0, {0.001, 0.002, 0.004, 0.008, 0.016, 0.032}, True),
    ],
)
def test_grid_grows_until_the_best_rate_is_inside(best, tried, at_edge):
    study = study_of("dense")
    done = play(study, valley(best))
    assert {run.learning_rate for run in done if run.stage == TUNING} == tried
    choice, _ = choose(study, "dense", done)
    assert choice.is_settled and choice.is_at_edge == at_edge
    assert choice.rate == min(tried, key=lambda rate: abs(np.log2(rate / best)))
    assert {(run.learning_rate, run.seed) for run in done if run.stage == FINAL} == {(choice.rate, 1), (choice.rate, 2)}


@pytest.mark.parametrize("order", range(5))
def test_order_of_runs_changes_nothing(order):
    study = study_of("dense", "hash", "switch")
    best = {"dense": 0.0005, "hash": 0.002, "switch": 0.008}
    done = play(study, lambda run: valley(best[run.model])(run), order)
    assert set(done) == set(play(study, lambda run: valley(best[run.model])(run)))


def test_models_are_finished_one_after_the_other():
    study = study_of("dense", "hash")
    models = [run.model for run in play(study, valley(0.002))]
    assert models == sorted(models)  # dense before hash


def test_rate_that_diverges_is_never_chosen():
    study = study_of("dense")
    done = play(study, lambda run: None if run.learning_rate > 0.0015 else 1.0 - run.learning_rate)
    assert choose(study, "dense", done)[0].rate == 0.001
    assert {run.learning_rate for run in done if run.stage == TUNING} == {0.0005, 0.001, 0.002, 0.004}


def test_grid_grows_downwards_where_all_rates_diverge():
    study = study_of("dense")
    done = play(study, lambda run: None if run.learning_rate > 0.0003 else 1.0 - run.learning_rate)
    assert choose(study, "dense", done)[0].rate == 0.00025


def test_model_whose_rates_all_diverge_is_not_trained():
    study = study_of("dense", "hash")
    done = play(study, lambda run: None if run.model == "dense" else 1.0)
    choice, _ = choose(study, "dense", done)
    assert choice.is_settled and choice.rate is None
    assert {run.model for run in done if run.stage == FINAL} == {"hash"}


def test_one_rate_needs_no_tuning():
    study = study_of("dense", learning_rates=(0.004,))
    done = play(study, valley(0.1))
    assert set(done) == {Run("dense", 0.004, 1, FINAL), Run("dense", 0.004, 2, FINAL)}
    assert expected_runs(study) == 2


def test_model_with_a_made_table_waits_for_its_source():
    study = study_of("dense", "clusters")
    waiting = replace(study.models["clusters"], table_of="dense", table=("build",))
    study = replace(study, models={**study.models, "clusters": waiting})
    done = {}
    assert {run.model for run in wanted(study, done)} == {"dense"}
    for rate in study.learning_rates:
        run = Run("dense", rate, study.tuning_seed, TUNING)
        done[run] = record(run, valley(0.002)(run))
    assert {run.model for run in wanted(study, done)} == {"dense", "clusters"}


def test_runs_are_known_by_their_records():
    study = study_of("dense", "hash")
    done = play(study, valley(0.004))
    assert done_of(study, done.values()) == done
    assert expected_runs(study) == 2 * (3 + 2)
