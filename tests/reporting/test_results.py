"""The parts of a report that need no logs: means and spreads, names of models, words on chance, numbers as text."""

import math
import re
import shutil
import statistics
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import edit

from fairseq_hash.reporting import comparison_table, naming
from fairseq_hash.reporting.comparison import words_on_noise
from fairseq_hash.reporting.logs import TrainingLog
from fairseq_hash.reporting.runs import Run, load_runs

PERPLEXITIES = st.floats(1, 1e4)


@given(st.lists(st.tuples(st.sampled_from("abc"), PERPLEXITIES, st.none() | st.floats(0, 9)), min_size=1, max_size=12))
def test_means_and_deviations_by_statistics(rows):
    """In the order of the models' first runs. 1e-9: sums in another order; the deviation loses digits to the mean."""
    names = ("model", "seed", "test_perplexity", "load_max_train")
    runs = [(model, seed, ppl, math.nan if load is None else load) for seed, (model, ppl, load) in enumerate(rows)]
    found = comparison_table.table_of_models(pd.DataFrame(runs, columns=names)).to_dict("records")
    assert [row["model"] for row in found] == list(dict.fromkeys(model for model, _, _ in rows))
    for row in found:
        values = [ppl for model, ppl, _ in rows if model == row["model"]]
        assert row["runs"] == len(values) and "seed" not in row
        assert row["test_perplexity"] == pytest.approx(statistics.fmean(values), rel=1e-9)
        if len(values) == 1:
            assert math.isnan(row["test_perplexity_sd"])
        else:
            deviation = pytest.approx(statistics.stdev(values), rel=1e-9, abs=1e-9 * max(values))
            assert row["test_perplexity_sd"] == deviation
        loads = [load for model, _, load in rows if model == row["model"] and load is not None]
        expected = statistics.fmean(loads) if loads else math.nan
        assert row["load_max_train"] == pytest.approx(expected, rel=1e-9, nan_ok=True)


@given(st.lists(st.tuples(st.floats(100, 110), st.floats(0, 10), st.integers(2, 9)), min_size=2, max_size=4))
def test_pairs_within_two_standard_errors_are_named(models):
    frame = pd.DataFrame(models, columns=["test_perplexity", "test_perplexity_sd", "runs"])
    words = words_on_noise(frame.assign(model=[f"M{i}" for i in range(len(models))]))
    assert words.startswith(f"With {min(n for _, _, n in models)} seeds a model, ")
    pairs = [(i, j) for i in range(len(models)) for j in range(i + 1, len(models))]
    for i, j in pairs:
        (mean, sd, n), (other, other_sd, other_n) = models[i], models[j]
        error = (sd**2 / n + other_sd**2 / other_n) ** 0.5
        if abs(abs(mean - other) - 2 * error) > 1e-9:  # else rounding decides
            assert (f"M{i} and M{j}" in words) == (abs(mean - other) < 2 * error)
    assert ("every difference" in words) == (not re.search(r"M\d and M\d", words))


def test_words_where_there_is_nothing_to_compare():
    frame = pd.DataFrame({"model": ["A", "B", "C"], "runs": [1, 1, 2], "valid_perplexity": [9.0, 8.0, 7.0]})
    frame["valid_perplexity_sd"] = [math.nan, math.nan, 0.1]
    assert words_on_noise(frame).startswith("One seed only of A and B: ")
    assert words_on_noise(frame.drop(columns=["valid_perplexity"])) == "These runs were not evaluated."
    assert words_on_noise(frame[2:]) == "2 seeds of C; there is no other model to compare it with."
    frame["runs"], frame["valid_perplexity_sd"] = 2, 0.1
    every = "With 2 seeds a model, every difference in valid perplexity exceeds two standard errors."
    assert words_on_noise(frame) == every


@pytest.mark.parametrize(("count", "left_out"), [(1, 0), (2, 1), (3, 1), (14, 1), (16, 2), (30, 3), (100, 10)])
def test_the_first_tenth_does_not_count(count, left_out):
    """At least one interval is left out and one is kept; order is that of the updates."""
    intervals = {update: {"wps": update} for update in reversed(range(count))}
    run = Run(Path("run"), TrainingLog(configs=[{}], intervals=intervals))
    assert comparison_table.settled_intervals(run) == [{"wps": update} for update in range(left_out, count)]


def test_models_are_named_by_what_differs(copies):
    """Two hash models by their two options; the other routers need none. Places and the seed name no model."""
    shutil.copytree(copies / "hash5", copies / "hash8")
    for old, new in (
        ("'num_experts': 4", "'num_experts': 8"),
        ("'hash_table': 'balanced'", "'hash_table': 'random'"),
        ("'save_dir': '", "'save_dir': '/elsewhere"),
    ):
        edit(copies / "hash8" / "train.log", old, new)
    runs = load_runs([copies / name for name in ("hash8", "dense5", "hash5", "dense6", "switch5")])
    assert {name: [run.folder.name for run in group] for name, group in naming.group_by_model(runs).items()} == {
        "Hash hash_table=random num_experts=8": ["hash8"],
        "Dense": ["dense5", "dense6"],
        "Hash hash_table=balanced num_experts=4": ["hash5"],
        "Switch": ["switch5"],
    }


@pytest.mark.parametrize(
    ("count", "text"),
    [(5504, "0.01 M"), (1_234_567, "1.23 M"), (999e6, "999.00 M"), (1e9, "1 B"), (4_543_210_000, "4.54 B")],
)
def test_counts_as_text(count, text):
    assert comparison_table.count_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (119.4, "119 s"), (120, "2.0 min"), (7199, "120.0 min"), (7200, "2.0 h"), (86400 * 3, "72.0 h")],
)
def test_times_as_text(seconds, text):
    assert comparison_table.duration_text(seconds) == text


def test_subsets_in_the_order_readers_expect():
    assert comparison_table.ordered(["test", "zeta", "valid", "alpha"]) == ["valid", "test", "alpha", "zeta"]


def test_markdown_keeps_its_columns():
    """A bar in a name parts no column; words stand left, numbers right."""
    frame = pd.DataFrame({"Model": ["a|b"], "Value": ["1"]})
    assert comparison_table.markdown(frame) == "| Model | Value |\n| --- | ---: |\n| a\\|b | 1 |"
    assert comparison_table.markdown(frame, words=True).splitlines()[1] == "| --- | --- |"
