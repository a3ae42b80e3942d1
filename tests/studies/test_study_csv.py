"""The CSV files of a study: their numbers by hand and by SciPy."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from made_report import by_scipy, read_csv, results_of
from made_study import BYTES, NATS, TOKENS, made_facts, made_runs_of_study, made_study, valid_curve
from scipy import stats

from fairseq_hash.studies.csv_tables import curves_csv, pairs_csv, results_csv
from fairseq_hash.studies.leads import lead_verdicts
from fairseq_hash.studies.ngram_lines import NGRAMS
from fairseq_hash.studies.records import FINAL, TUNING
from fairseq_hash.studies.report import write_study_report
from fairseq_hash.studies.results import gather


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The folder of a whole report, written once."""
    out = tmp_path_factory.mktemp("report")
    paths = write_study_report(made_study(), made_facts(), made_runs_of_study(), out)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in paths)
    return out


@pytest.mark.parametrize("model", NATS)
def test_numbers_of_a_model(report, model):
    """Perplexity, bits per byte and lead with their intervals, each from the made nats."""
    row = pd.read_csv(report / "results.csv").set_index("model").loc[model]
    nats, ends = np.array(by_scipy(NATS[model])), ["", "_low", "_high"]
    assert [row[f"test_perplexity{end}"] for end in ends] == pytest.approx(np.exp(nats))
    bits = nats / math.log(2) * TOKENS / BYTES
    assert [row[f"test_bits_per_byte{end}"] for end in ends] == pytest.approx(bits)
    assert (row["seeds"], row["diverged"], row["missing"]) == (3, 0, 0)
    if model != "Dense":
        mean, low, high = by_scipy(np.subtract(NATS[model], NATS["Dense"]))
        leads = [100 * (1 - math.exp(difference)) for difference in (mean, high, low)]
        assert [row[f"lead_percent{end}"] for end in ends] == pytest.approx(leads)
    else:
        assert math.isnan(row["lead_percent"])


def test_other_columns(report):
    """Rates and their edge, sizes, the mean speed, and the worst load and drop of the seeds."""
    rows = pd.read_csv(report / "results.csv").set_index("model")
    assert list(rows.index) == [*NATS, *(NGRAMS[order] for order in "123")]
    for order, nats in made_facts().ngrams["test"].items():
        row, lead = rows.loc[NGRAMS[order]], by_scipy(np.subtract(nats, NATS["Dense"]))
        assert [row[name] for name in ("test_nats", "test_perplexity")] == pytest.approx([nats, math.exp(nats)])
        assert row["test_bits_per_byte"] == pytest.approx(nats / math.log(2) * TOKENS / BYTES)
        leads = [100 * (1 - math.exp(lead[place])) for place in (0, 2, 1)]
        assert [row[f"lead_percent{end}"] for end in ("", "_low", "_high")] == pytest.approx(leads)
        assert math.isnan(row["test_nats_low"]) and math.isnan(row["seeds"])
    rows = rows.loc[list(NATS)]
    assert rows["learning_rate"].tolist() == [0.002, 0.004, 0.002, 0.002, 0.004]
    assert rows["at_edge"].tolist() == [False, True, False, False, True]
    assert rows.loc["Hash", "valid_perplexity"] == pytest.approx(math.exp(4.62 - 0.1 + 0.001))
    for model in ("Hash", "Hash, balanced"):
        assert rows.loc[model, ["parameters", "active", "experts"]].tolist() == [3e6, 1e6, 16]
        assert rows.loc[model, ["load_max", "dropped"]].tolist() == pytest.approx([1.8, 0.03])
        assert rows.loc[model, "tokens_per_second"] == 1002
    assert rows.loc["Dense", ["load_max", "dropped"]].isna().all()
    assert rows["verdict"].tolist()[1:] == ["better", "equivalent", "undecided", "better"]


def test_one_row_a_run(report):
    """All runs, tuning included: also the one that diverged, and both evaluations of the shared trainings."""
    runs, tuned = pd.read_csv(report / "runs.csv"), pd.read_csv(report / "tuning.csv")
    assert len(runs) == len(made_runs_of_study()) == 24
    final = runs[(runs["model"] == "Hash") & (runs["stage"] == FINAL)]
    assert final["test_nats: Hash"].tolist() == list(NATS["Hash"])
    assert final["test_nats: Hash, balanced"].tolist() == list(NATS["Hash, balanced"])
    assert len(tuned) == 12 and (runs["stage"] == TUNING).sum() == 12
    chosen = tuned[tuned["chosen"]].set_index("model")["learning_rate"]
    assert chosen.to_dict() == {"Dense": 0.002, "Hash": 0.004, "Twin": 0.002, "Switch": 0.002}
    (diverged,) = tuned[tuned["diverged"].notna()].to_dict("records")
    assert (diverged["model"], diverged["diverged"]) == ("Switch", "loss is nan at update 7")
    assert math.isnan(diverged["valid_nats"])


def test_curves_and_pairs(report):
    """Each validation of the final runs by tokens, seconds and FLOPs; each verdict, and what it is adjusted for."""
    curves = pd.read_csv(report / "curves.csv")
    assert curves["model"].value_counts().to_dict() == {
        **dict.fromkeys(("Dense", "Hash", "Twin", "Switch"), 12),  # 3 seeds, 4 validations
        **{NGRAMS[order]: 1 for order in "123"},
    }
    of = curves[(curves["model"] == "Hash") & (curves["seed"] == 2)]
    assert of["valid_nats"].tolist() == pytest.approx(valid_curve("Hash", 1))
    assert of["tokens"].tolist() == [10_000, 20_000, 30_000, 40_000] and of["seconds"].tolist() == [60, 120, 180, 240]
    assert of["flops"].tolist() == pytest.approx([6e10, 12e10, 18e10, 24e10])
    pairs = pd.read_csv(report / "pairs.csv")
    assert pairs["adjusted_with"].value_counts().to_dict() == {"all": 10, "baseline": 4}
    p_values = [stats.ttest_rel(NATS[one], NATS["Dense"]).pvalue for one in NATS if one != "Dense"]
    beside = pairs[pairs["adjusted_with"] == "baseline"].set_index("other")
    assert beside["p_difference"].min() == pytest.approx(4 * min(p_values))
    assert beside.loc["Hash", ["verdict", "better"]].tolist() == ["better", "Hash"]


def test_csv_files_of_little():
    """n-grams that valid lacks, no pairs, the study's own pairs; whole numbers stay whole."""
    facts = made_facts()
    facts = dataclasses.replace(facts, ngrams={**facts.ngrams, "valid": {"1": 6.0}})
    results = gather(made_study(comparisons=(("Hash", "Twin"),)), facts, made_runs_of_study())
    text = results_csv(results, lead_verdicts(results)).decode()
    rows = read_csv(text.encode()).set_index("model")
    assert rows["valid_perplexity"].isna().tolist() == [False] * 6 + [True] * 2
    assert "\nHash,,3,0,0,0.004," in text and ",3000000,1000000,16," in text
    assert "\nHash,2,40000," in curves_csv(results).decode()
    pairs = read_csv(pairs_csv(results))
    assert pairs["adjusted_with"].value_counts().to_dict() == {"all": 10, "baseline": 4, "comparisons": 1}
    assert read_csv(pairs_csv(results_of({}))).empty and read_csv(curves_csv(results_of({})))["seed"].isna().all()
