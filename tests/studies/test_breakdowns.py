"""Where on test the nats are, of a made study: by position and by count in training, against sums by hand."""

import dataclasses
import itertools

import numpy as np
import pytest
from made_study import NATS, made_facts, made_runs_of_study, made_study

from fairseq_hash.studies import charts
from fairseq_hash.studies.breakdowns import (
    frequency_labels,
    frequency_ranges,
    frequency_tokens,
    position_labels,
    position_ranges,
)
from fairseq_hash.studies.ngram_lines import NGRAMS
from fairseq_hash.studies.results import gather
from fairseq_hash.studies.tables import frequency_table, position_table


@pytest.fixture(scope="module")
def results():
    return gather(made_study(), made_facts(), made_runs_of_study())


def test_nats_by_position(results):
    """Each range is the mean of nats + 1/p over its positions; the gain is from positions 3-4 to the last range."""
    table = position_table(results)
    dense = table.set_index("Model").loc["Dense"]
    ranges = {"1": (1, 2), "2": (2, 3), "3-4": (3, 5), "5-8": (5, 9), "9-16": (9, 17)}
    expected = {label: 4.52 + np.mean([1 / p for p in range(*ends)]) for label, ends in ranges.items()}
    assert {label: float(dense[label]) for label in ranges} == pytest.approx(expected, abs=6e-4)
    assert float(dense["Gain from context"]) == pytest.approx(expected["3-4"] - expected["9-16"], abs=6e-4)
    (chart,) = charts.position_charts(results)
    assert chart.lines[0].y == pytest.approx(list(expected.values())) and [*chart.lines[0].x] == [1, 2, 4, 8, 16]
    assert chart.lines[-1].name == NGRAMS["3"] and chart.lines[-1].y == pytest.approx([4.6] * 2)


def test_ranges_of_positions():
    """128 positions have eight ranges; any length is covered once."""
    assert position_labels(128) == ["1", "2", "3-4", "5-8", "9-16", "17-32", "33-64", "65-128"]
    for length in (1, 2, 3, 100, 129):
        covered = itertools.chain.from_iterable(range(*ends) for ends in position_ranges(length))
        assert list(covered) == list(range(length))


def test_nats_by_frequency(results):
    """Beside the baseline, paired by seed; the trigram's beside the mean; ranges of few tokens join the next one."""
    table = frequency_table(results).set_index("Model")
    assert list(table.index) == [
        *("Share of test", "Dense: nats", "Hash", "Twin", "Switch", "Hash, balanced"),
        "Kneser-Ney, 3 tokens (trigram)",
    ]
    assert table.columns.tolist() == ["0-99", "100+"]
    assert table.loc["Share of test"].tolist() == ["50.0%", "50.0%"]
    assert table.loc["Dense: nats"].tolist() == ["6.320", "7.520"]  # the first: 100 tokens of 5.52, 400 of 6.52
    assert table.loc["Hash"].tolist() == [f"{np.mean(NATS['Hash']) - 4.52:.3f}"] * 2
    assert table.iloc[-1].tolist() == ["-0.520", "-4.520"]
    (chart,) = charts.frequency_charts(results)
    trigram = next(line for line in chart.lines if line.name == NGRAMS["3"])
    assert trigram.y == pytest.approx([-0.52, -4.52], abs=1e-9) and trigram.style == "points"


@pytest.mark.parametrize(
    ("tokens", "labels"),
    [
        ([500, 200, 300, 400], ["0", "1-9", "10-99", "100-999"]),
        ([118, 17, 103, 513], ["0-99", "100-999"]),
        ([300, 199, 0, 199], ["0", "1-999"]),
        ([300, 0, 0, 7], ["0-999"]),
        ([0, 3, 1, 0], ["0-999"]),
    ],
)
def test_ranges_of_counts(tokens, labels):
    """Each range has 200 tokens of test, and each recorded range is in one of them."""
    facts = dataclasses.replace(
        made_facts(), frequency_labels=["0", "1-9", "10-99", "100-999"], frequency_tokens=tokens
    )
    assert frequency_labels(facts) == labels
    ranges = frequency_ranges(facts)
    assert [number for ends in ranges for number in range(*ends)] == [0, 1, 2, 3]
    assert frequency_tokens(facts).sum() == sum(tokens)
