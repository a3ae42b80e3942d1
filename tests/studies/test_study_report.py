"""The report of a study: its numbers by hand and by SciPy, its words, and what it says of a study that is not done."""

import dataclasses
import math
import re

import numpy as np
import pandas as pd
import pytest
from html_page import Page
from made_report import by_heading, by_scipy, read_csv, results_of, without
from made_study import (
    DOCUMENT_TOKENS,
    LEAD_NATS,
    NATS,
    SEEDS,
    made_facts,
    made_record,
    made_runs_of_study,
    made_study,
    valid_curve,
)
from scipy import stats

from fairseq_hash.reporting.charts import Chart
from fairseq_hash.studies import charts
from fairseq_hash.studies.csv_tables import results_csv, runs_csv, tuning_csv
from fairseq_hash.studies.leads import (
    LeadCurve,
    comparison_verdicts,
    course,
    lead_curves,
    lead_verdicts,
    pair_verdicts,
)
from fairseq_hash.studies.ngram_lines import NGRAMS, lead_curves_of
from fairseq_hash.studies.records import FINAL
from fairseq_hash.studies.report import study_summary, write_study_report
from fairseq_hash.studies.results import one_under_two_names
from fairseq_hash.studies.schedule import Run
from fairseq_hash.studies.tables import number, training_table

PICTURES = ["perplexity.png", "lead.png", "position.png", "frequency.png", "tuning.png"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The folder of a whole report, written once."""
    out = tmp_path_factory.mktemp("report")
    paths = write_study_report(made_study(), made_facts(), made_runs_of_study(), out)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in paths)
    return out


@pytest.fixture(scope="module")
def parts():
    """The parts of a whole report by their heading."""
    return by_heading(results_of())


def test_markdown_stands_alone(report):
    """It is small, has every section, rounds as the CSV says, names each verdict, and points to nothing else."""
    text = (report / "results.md").read_text()
    assert len(text.encode()) < 40_000
    headings = re.findall(r"^##? (.+)$", text, re.MULTILINE)
    assert headings == [
        *("A made study", "Text and protocol", "Models", "Diverged runs", "Results", "Lead over Dense", "All pairs"),
        *("Perplexity during training", "Lead over Dense during training", "Use of context"),
        *("Rare and frequent tokens", "Tuning of the learning rate", "Limits", "Who ran it"),
    ]
    assert "| Hash | 83.23 (79.16 to 87.52) | 1.8226 (1.8019 to 1.8433) | 91.93 | 0.004 (edge) | 3 |" in text
    assert "| Kneser-Ney, 3 tokens (trigram) | 99.48 | 1.8961 | 99.48 | – |" in text
    assert "| Kneser-Ney, 3 tokens (trigram) | -8.3 % (-13.8 to -3.1) | – | – |" in text
    assert "| Hash | 212.94 | 131.76 | 110.06 | 91.93 | 2.4e+11 | 4.2 |" in text
    assert "| Kneser-Ney, 3 tokens (trigram) | 99.48 | 99.48 | 99.48 | 99.48 | – | – |" in text
    assert "| Kneser-Ney, 3 tokens (trigram) | 60.1 % | 34.3 % | 19.7 % | 2.0 % |" in text
    assert text.count("6.000 (1 token), 5.000 (2 tokens), 4.600 (3 tokens)") == 2
    assert "Hash, balanced is scored with balanced assignment" in text
    assert "Hash is better than Dense: 9.4 % lower perplexity" in text
    assert "Dense and Twin are equivalent within 1 %" in text and "Dense and Switch are undecided" in text
    assert "| Switch | tuning | 0.004 | 100 | loss is nan at update 7 |" in text
    assert "| Switch | 4.700 | 4.600 (chosen) | diverged |" in text
    assert "These numbers are made." in text and "one corpus and small models" in text
    assert "abc123" in text and "2026-11-20T10:00:00+00:00 to 2026-11-23" in text and "-0.0 " not in text
    assert "](" not in text


def test_page_has_the_charts_and_makes_no_request(report):
    """Charts as data for the script and as pictures without it, tables as in Markdown, nothing from elsewhere."""
    page = Page.of(report / "index.html")
    titles = [chart["title"] for chart in page.charts]
    assert titles == [
        *("Perplexity by tokens", "Perplexity by time", "Perplexity by FLOPs", "Lead over Dense by tokens"),
        *("Nats by position in the sample", "Nats by the token's count in training", "Valid loss by learning rate"),
    ]
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert page.policy.startswith("default-src 'none'")
    assert len(page.tables) == len(re.findall(r"^\| ---", (report / "results.md").read_text(), re.MULTILINE))
    assert "Does it report?" in page.text
    for name in PICTURES:
        assert (report / name).read_bytes().startswith(b"\x89PNG") and (report / name).stat().st_size > 10_000


def test_perplexity_charts():
    """Means of nats over the seeds, against three x axes; n-gram models are level; shared trainings are drawn once."""
    drawn = charts.perplexity_charts(results_of())
    for chart, last in zip(drawn, (0.04, 4.0, 240.0), strict=True):
        lines = {line.name: line for line in chart.lines}
        assert list(lines) == ["Dense", "Hash", "Twin", "Switch", NGRAMS["3"]]
        assert lines["Hash"].x == pytest.approx(last * np.arange(1, 5) / 4)
        assert lines["Dense"].y == pytest.approx(np.exp([5.52, 5.02, 4.82, 4.62]))
        assert lines["Dense"].spread[-1] == pytest.approx(np.exp([4.6, 4.64]))
        assert lines[NGRAMS["3"]].y == pytest.approx([math.exp(4.6)] * 2)
        assert chart.log_y and lines["Dense"].colour is None
        colours = [line.colour for line in chart.lines[1:4]]
        assert len(set(colours)) == 3 and None not in colours
    assert drawn[2].x_label == "FLOPs of training (10^9)"


def test_lead_during_training():
    """The curve by hand, the words by the paired change; half is the second of four validations."""
    results = results_of()
    curve = lead_curves(results, results.baseline)["Hash"]
    noise = 0.001 * np.arange(3)[:, None]
    assert curve.lead_SN == pytest.approx(100 * (1 - np.exp(noise - LEAD_NATS)))
    assert curve.half == 1
    words = course("Hash", curve)
    assert words.startswith(
        "Hash has a lead of 13.0 % at half of the training and of 9.4 % at its end. It shrank by 3.6"
    )
    mean, low, high = by_scipy(curve.lead_SN[:, 3] - curve.lead_SN[:, 1])
    assert words.endswith(f"{-mean:.1f} points (95 % interval over seeds {-high:.1f} to {-low:.1f}).")
    counted = lead_curves_of(results, results.baseline)
    (chart,) = charts.lead_charts(results, results.baseline, {"Hash": curve}, counted)
    assert chart.lines[0].y == pytest.approx(curve.lead_SN.mean(axis=0))
    dense_SN = np.array([valid_curve("Dense", place) for place in range(3)])
    assert counted["3"].lead_SN == pytest.approx(100 * (1 - np.exp(4.6 - dense_SN)))
    assert NGRAMS["3"] not in {line.name for line in chart.lines}  # at one point only it is where the models are
    tokens = np.arange(1.0, 5)
    for lead_SN, drawn in (([[60.0, 30, 12, 4]], True), ([[60.0, 12, 4, -30]], False)):
        counted = {"3": LeadCurve(tokens, np.array(lead_SN), 1)}
        (chart,) = charts.lead_charts(results, results.baseline, {"Hash": curve}, counted)
        trigrams = [line for line in chart.lines if line.name == NGRAMS["3"]]
        assert bool(trigrams) == drawn == (NGRAMS["3"] in chart.values)
        assert not drawn or trigrams[0].y == pytest.approx([math.nan, math.nan, 12, 4], nan_ok=True)


@pytest.mark.parametrize(
    ("lead_SN", "said"),
    [
        ([[1, 2, 3], [1, 2.1, 3]], "It grew by 0.9 points"),
        ([[-1, -2, -3], [-1, -2.1, -3]], "It fell by 0.9 points"),
        ([[-3, -2, -1], [-3, -2.1, -1]], "It rose by 1.1 points"),
        ([[1, 2, 3], [1, 2, 1.5]], "No clear change: -9.3 to 9.8"),
        ([[3, 2, 1]], "It shrank by 1.0 points (one seed"),
    ],
)
def test_whether_a_lead_closes(lead_SN, said):
    """The word follows the sign; a change whose interval holds 0 is called none."""
    curve = LeadCurve(np.array([1.0, 2.0, 4.0]), np.array(lead_SN, dtype=float), 1)
    assert said in course("Hash", curve)


def test_lead_needs_equal_validations():
    """Trainings that were validated at other points are not paired."""
    done = made_runs_of_study()
    for seed in SEEDS:
        run = Run("Hash", 0.004, seed, FINAL)
        done[run] = dataclasses.replace(done[run], validations=done[run].validations[1:])
    results = results_of(done)
    assert list(lead_curves(results, results.baseline)) == ["Twin", "Switch"]


def test_lead_over_dense_where_another_model_is_the_baseline():
    """It has a part and a picture of its own."""
    parts = by_heading(results_of(baseline="Hash"))
    over_dense = parts["Lead over Dense during training"]
    assert over_dense.picture != parts["Lead over Hash during training"].picture
    assert over_dense.table.set_index("Model").loc["Hash", "at 100%"] == "9.4 %"
    assert "Lead over Dense during training" in by_heading(results_of())


def test_lead_over_documents(parts):
    """Where each document has the same difference, its interval over documents is a point; with one, there is none."""
    table = parts["Lead over Dense"].table.set_index("Model")
    assert table.loc["Hash", "Lead (95 % over parts of test)"] == "9.4 % (9.4 to 9.4)"
    done = made_runs_of_study()
    for run, record in done.items():
        test = {
            name: dataclasses.replace(one, document_nats=one.document_nats[:1]) for name, one in record.test.items()
        }
        done[run] = dataclasses.replace(record, test=test)
    results = results_of(done)
    results = dataclasses.replace(
        results, facts=dataclasses.replace(results.facts, document_tokens=DOCUMENT_TOKENS[:1])
    )
    assert by_heading(results)["Lead over Dense"].table["Lead (95 % over parts of test)"].tolist() == ["–"] * 7


def test_runs_that_were_validated_elsewhere():
    """A model whose runs have validations of their own is in no mean over seeds, and no column is out of order."""
    done = made_runs_of_study()
    run = Run("Dense", 0.002, 2, FINAL)
    done[run] = dataclasses.replace(done[run], validations=done[run].validations[1:])
    results = results_of(done)
    table = training_table(results).set_index("Model")
    assert list(table.index)[:3] == ["Hash", "Twin", "Switch"]
    assert list(table.columns) == ["at 25%", "at 50%", "at 75%", "at 100%", "FLOPs", "Minutes"]
    names = {line.name for line in charts.perplexity_charts(results)[0].lines}
    assert "Dense" not in names and "Hash" in names
    assert "Perplexity during training" in by_heading(results)
    for model, rate in (("Dense", 0.002), ("Hash", 0.004), ("Twin", 0.002), ("Switch", 0.002)):
        run = Run(model, rate, 2, FINAL)
        done[run] = dataclasses.replace(done[run], validations=done[run].validations[1:])
    assert "Perplexity during training" not in by_heading(results_of(done))


def test_one_model_under_two_names():
    """Equal to the last bit with each seed; one seed alone says nothing, and a digit more is another model."""
    assert one_under_two_names(results_of()) == ""
    done = made_runs_of_study()
    for place, seed in enumerate(SEEDS):
        run = Run("Twin", 0.002, seed, FINAL)
        done[run] = made_record(run, valid_curve("Twin", place), {"Twin": NATS["Dense"][place]})
    said = "Dense and Twin have the very same loss with each seed: they are one model under 2 names."
    assert one_under_two_names(results_of(done)) == said
    done[run] = made_record(run, valid_curve("Twin", place), {"Twin": NATS["Dense"][-1] + 1e-12})
    assert one_under_two_names(results_of(done)) == ""


def test_verdicts_are_for_all_planned_pairs():
    """A study of which one model is missing judges the others as strictly as the whole one will."""
    whole, part = results_of(), results_of(without(made_runs_of_study(), model="Switch"))
    for verdicts in (lead_verdicts, lambda results: {(v.one, v.other): v for v in pair_verdicts(results)}):
        all_of_them, some = verdicts(whole), verdicts(part)
        assert len(some) < len(all_of_them)
        for name, verdict in some.items():
            assert verdict.p_difference >= all_of_them[name].p_difference - 1e-12
            assert verdict.p_equivalence >= all_of_them[name].p_equivalence - 1e-12
    differences = np.subtract(NATS["Hash"], NATS["Dense"])
    (alone,) = lead_verdicts(
        results_of(
            {r: d for r, d in whole.done.items() if r.model in ("Dense", "Hash")},
            models={name: whole.study.models[name] for name in ("Dense", "Hash")},
        )
    ).values()
    assert alone.p_difference == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)


def test_comparisons_of_the_study():
    """Only those pairs, in the study's order, adjusted for their number; they stand below the leads, and are said."""
    comparisons = (("Hash", "Twin"), ("Switch", "Hash"))
    results = results_of(comparisons=comparisons)
    verdicts = comparison_verdicts(results)
    assert [(verdict.one, verdict.other) for verdict in verdicts] == list(comparisons)
    p_values = [stats.ttest_rel(NATS[one], NATS[other]).pvalue for one, other in comparisons]
    assert verdicts[0].p_difference == pytest.approx(2 * p_values[0]) and p_values[0] < p_values[1]
    headings = list(by_heading(results))
    assert headings.index("Comparisons") == headings.index("Lead over Dense") + 1
    assert "Comparisons" not in by_heading(results_of())
    assert f"{verdicts[0].words()}." in study_summary(results.study, results.facts, results.done)
    one_is_missing = results_of(without(made_runs_of_study(), model="Switch"), comparisons=comparisons)
    assert [verdict.other for verdict in comparison_verdicts(one_is_missing)] == ["Twin"]


def test_study_without_runs(tmp_path):
    """Every model is named with what it lacks; nothing is drawn, and the n-gram lines are there."""
    paths = write_study_report(made_study(), made_facts(), {}, tmp_path)
    assert not [path for path in paths if path.suffix == ".png"]
    text = (tmp_path / "results.md").read_text()
    for name in NATS:
        assert f"| {name} | its learning rate is not chosen yet (0 tried)" in text
        assert f"| {name} | – | – | – |" in text
    assert "Dense, has no final run yet" in text and "Kneser-Ney, 2 tokens | 148.41" in text
    assert len(pd.read_csv(tmp_path / "results.csv")) == 8 and len(pd.read_csv(tmp_path / "tuning.csv")) == 0


def test_study_without_its_baseline():
    """No lead is shown, and that is said; pairs of the others are compared."""
    parts = by_heading(results_of(without(made_runs_of_study(), model="Dense")))
    (lacks,) = parts["Not complete"].table.to_dict("records")
    assert lacks == {"Model": "Dense", "Lacks": "final runs with seed 1, 2, 3"}
    assert "no final run yet" in parts["Lead over the baseline"].after
    assert "Lead over Dense during training" not in parts and "Rare and frequent tokens" not in parts
    assert len(parts["All pairs"].table) == 6


def test_study_with_one_seed_so_far():
    """Means stand without ends, verdicts are undecided, and the seeds that lack are named."""
    done = made_runs_of_study()
    for model in ("Dense", "Hash", "Twin", "Switch"):
        done = without(done, model=model, seeds=(2, 3))
    results = results_of(done)
    parts = by_heading(results)
    row = parts["Results"].table.set_index("Model").loc["Hash"]
    assert (row["Test perplexity"], row["Seeds"]) == (f"{math.exp(4.40):.2f}", "1")
    assert set(parts["Lead over Dense"].table["Verdict"]) == {"undecided", "–"}  # a dash of what is counted
    assert "final runs with seed 2, 3" in parts["Not complete"].table["Lacks"].tolist()
    assert "one seed" in parts["Lead over Dense during training"].after
    assert read_csv(results_csv(results, lead_verdicts(results)))["test_perplexity_low"].isna().all()


def test_evaluation_that_is_missing():
    """A model that shares trainings may lack its evaluation although they are done."""
    done = {
        run: dataclasses.replace(one, test={name: of for name, of in one.test.items() if name == "as trained"})
        for run, one in made_runs_of_study().items()
    }
    parts = by_heading(results_of(done))
    assert parts["Not complete"].table.to_numpy().tolist() == [
        ["Hash, balanced", "evaluation of Hash's final runs, or these runs"]
    ]
    assert len(parts["Results"].table) == 8 and len(parts["All pairs"].table) == 6


def test_final_run_that_diverged():
    """It is listed and counted, and in no mean; its model gets no verdict, with whatever other model."""
    done, run = made_runs_of_study(), Run("Hash", 0.004, 3, FINAL)
    done[run] = made_record(run, [], diverged="gradient is inf")
    results = results_of(done)
    parts = by_heading(results)
    row = parts["Results"].table.set_index("Model").loc["Hash"]
    assert row["Seeds"] == "2 (1 diverged)"
    assert row["Test perplexity"].startswith(f"{math.exp(np.mean(NATS['Hash'][:2])):.2f} ")
    assert ["Hash", "final", "0.004", "3", "gradient is inf"] in parts["Diverged runs"].table.to_numpy().tolist()
    assert "Not complete" not in parts
    assert list(lead_verdicts(results)) == ["Twin", "Switch"]
    assert all({"Hash", "Hash, balanced"}.isdisjoint((one.one, one.other)) for one in pair_verdicts(results))
    done[Run("Dense", 0.002, 1, FINAL)] = made_record(Run("Dense", 0.002, 1, FINAL), [], diverged="gradient is inf")
    assert lead_verdicts(results_of(done)) == {}
    assert len(read_csv(runs_csv(results))) == 24 and len(read_csv(tuning_csv(results))) == 12


def test_runs_of_two_machines():
    """Processors are counted, and speeds are said not to compare."""
    done, run = made_runs_of_study(), Run("Hash", 0.004, 3, FINAL)
    done[run] = dataclasses.replace(done[run], provenance={"processor": "Another one", "date": "2026-12-01"})
    parts = by_heading(results_of(done))
    assert "do not compare" in parts["Results"].after
    origin = dict(parts["Who ran it"].table.to_numpy().tolist())
    assert origin["Processor"] == "A processor (23 runs); Another one (1 runs)"
    assert origin["Dates (UTC)"].endswith("to 2026-12-01")


def test_summary_for_the_terminal():
    """The table of models, the verdicts, the trigram, and what is missing."""
    done = without(made_runs_of_study(), model="Switch", seeds=(2,))
    lines = study_summary(made_study(), made_facts(), done).splitlines()
    assert re.match(r"Hash +83\.23 \(79\.16 to 87\.52\) ", next(line for line in lines if line.startswith("Hash ")))
    assert any(line.startswith("Dense and Twin are equivalent") for line in lines)
    assert "Hash, balanced is scored with balanced assignment" in lines[-2]
    assert [lines[-3], lines[-1]] == [
        "All models are below (better than) the trigram's perplexity of 99.48.",
        "Missing: Switch: final runs with seed 2.",
    ]


def test_tuning_chart():
    """A line ends before the rates at which its training diverged."""
    (chart,) = charts.tuning_charts(results_of())
    assert isinstance(chart, Chart) and chart.log_x
    lines = {line.name: line for line in chart.lines}
    assert [*lines["Switch"].x] == [0.001, 0.002] and [*lines["Hash"].y] == [4.7, 4.6, 4.55]
    assert lines[NGRAMS["3"]].y == pytest.approx([4.6] * 2)
    (chart,) = charts.tuning_charts(results_of(trigram=2.0))  # far below what is drawn
    assert NGRAMS["3"] not in {line.name for line in chart.lines}


def test_no_negative_zero():
    """A number that rounds to 0 has no sign."""
    assert (number(-0.004, 2), number(-0.006, 2), number(math.nan, 2)) == ("0.00", "-0.01", "–")
