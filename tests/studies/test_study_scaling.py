"""Perplexity by the number of experts in a study's report: families by name, and fits of made power laws."""

import dataclasses
import math

import numpy as np
import pytest
from made_study import SEEDS, made_facts, made_record, made_study, valid_curve

from fairseq_hash.studies.definition import StudyModel
from fairseq_hash.studies.families import (
    families_of,
    fits_of,
    fits_table,
    scaling_charts,
    scaling_table,
    scaling_words,
)
from fairseq_hash.studies.leads import lead_verdicts
from fairseq_hash.studies.ngram_lines import NGRAMS
from fairseq_hash.studies.parts import parts_of
from fairseq_hash.studies.records import FINAL
from fairseq_hash.studies.results import gather
from fairseq_hash.studies.schedule import Run

# Nats are 4.5 times E to the power of this. The families cross at no E above 1.
SLOPES = {"Hash": -0.02, "Switch": -0.03}
EXPERTS = (4, 16, 64)


def results_of(scaling=True, without=(), kink=0.0, experts=None):
    """Return a study of two families and a dense baseline, with one learning rate; 16 experts are off by `kink`."""
    counts = experts or dict.fromkeys(SLOPES, EXPERTS)
    experts = {"Dense": 0} | {f"{name} {count}": count for name in SLOPES for count in counts[name]}
    models = {name: StudyModel(name, experiment="x") for name in experts}
    study = made_study(models=models, learning_rates=(0.001,), scaling=scaling)
    done = {}
    for name, count in experts.items():
        factor = count ** SLOPES[name.split()[0]] if count else 1
        for number, seed in enumerate(SEEDS):
            nats = (4.5 + 0.001 * number) * factor + kink * (count == 16)
            run = Run("Hash" if count else "Dense", 0.001, seed, FINAL)
            record = made_record(run, valid_curve("Dense", number), {name: nats}, model=name, experts=count)
            if name not in without:
                done[Run(name, 0.001, seed, FINAL)] = record
    return gather(study, made_facts(), done)


def test_families_are_by_name():
    """The number at the end is left out, and the dense baseline is the point of one expert."""
    families = families_of(results_of())
    assert {name: list(family) for name, family in families.items()} == {name: [1, 4, 16, 64] for name in SLOPES}
    assert families["Hash"][16].name == "Hash 16" and families["Switch"][1].name == "Dense"
    assert families_of(results_of(scaling=False)) == {}


def test_fits_recover_the_slopes():
    """A power law without noise is found again, in numbers, words, table and chart."""
    results = results_of()
    families = families_of(results)
    fits = fits_of(results, families)
    assert {name: found.coefficients.b for name, found in fits.items()} == pytest.approx(SLOPES, abs=1e-6)
    assert set(fits["Hash"].sizes) == {1_000_000}
    words = scaling_words(results, families, fits)
    ends = f"d = {math.log10(4.501):.4f} (95 % interval {math.log10(4.501) - 0.0002:.4f} to"
    assert f"Hash: b = -0.0200 (95 % interval -0.0200 to -0.0200), {ends}" in words
    assert "That is a plain power law." in words and "perplexity by 0.0 %" in words
    assert words.count("Hash, Switch: fitted: b, d; held: a at 0 (the points have one N)") == 1
    assert "Hash and Switch do not cross from E = 2 to 256 (run: up to 64): Switch has the lower loss" in words
    table = scaling_table(results, families).set_index("Family")
    assert table.loc["Kneser-Ney, 3 tokens (trigram)"].tolist() == ["99.48"] * 4
    assert table.loc["Hash", "E = 16"] == f"{math.exp(4.501 * 16**-0.02):.2f}"
    (chart,) = scaling_charts(results, families, fits)
    measured, fitted = (line for line in chart.lines if line.name == "Hash")
    assert [*measured.x] == [1, 4, 16, 64]
    assert fitted.y[[0, -1]] == pytest.approx(measured.y[[0, -1]], rel=1e-4)
    (trigram,) = (line for line in chart.lines if line.name == NGRAMS["3"])
    assert trigram.y == pytest.approx([math.exp(4.6)] * 2)


def test_a_family_of_many_experts():
    """With 5 different E a family has E_start and E_max, with intervals, and a plain power law beside them."""
    results = results_of(experts={"Hash": (2, 4, 16, 64, 128), "Switch": (4, 16, 64)})
    families = families_of(results)
    words = scaling_words(results, families, fits_of(results, families)).split("\n\n")
    hashed, switch = words[:2]
    assert hashed.startswith("Hash: b = ") and "e_start = " in hashed and "e_max = " in hashed
    assert "A plain power law has b = -0.0200" in hashed and "That is a plain power law." in switch
    assert words[2].startswith("Hash: fitted: b, d, e_start, e_max;") and words[3].startswith("Switch: fitted: b, d;")
    assert "far out of their range" in words[4]


def test_published_sizes_are_not_called_out_of_range():
    """From 15 million parameters on they are not."""
    results = results_of()
    done = {run: dataclasses.replace(one, active=15_000_000) for run, one in results.done.items()}
    results = gather(results.study, results.facts, done)
    families = families_of(results)
    assert "out of their range" not in scaling_words(results, families, fits_of(results, families))


def test_fits_that_miss_say_so():
    """How far a fit is off at its worst E, beside the mean over the seeds; the published ones stand beneath."""
    results = results_of(kink=0.05)
    families = families_of(results)
    fits = fits_of(results, families)
    table = fits_table(results, families, fits).set_index("Router")
    assert list(table.index) == ["Hash", "Switch", "S-BASE, published", "RL-R, published", "HASH, published"]
    found = fits["Hash"].coefficients
    gaps = [
        np.mean(list(of.test_nats.values())) - 10**found.d * count**found.b for count, of in families["Hash"].items()
    ]
    miss = 100 * np.expm1(np.abs(gaps).max())
    assert miss > 1 and table.loc["Hash", "Misses by up to"] == f"{miss:.1f} %"
    assert f"misses the mean perplexity by {miss:.1f} %" in scaling_words(results, families, fits)
    # Clark et al. 2022: b + c log10 N.
    assert table.loc["HASH, published", "Exponent of E' at this N"] == f"{-0.136 + 0.012 * 6:.4f}"


def test_part_of_the_report():
    """It is there although the baseline lacks, and then without fits."""
    results = results_of(without=("Dense", "Switch 4"))
    parts = {part.heading: part for part in parts_of(results, lead_verdicts(results))}
    part = parts["Scaling with the number of experts"]
    assert list(part.table.columns) == ["Family", "E = 4", "E = 16", "E = 64"] and part.table.iloc[1, 1] == "–"
    assert "Fits" not in parts and len(part.charts) == 1
