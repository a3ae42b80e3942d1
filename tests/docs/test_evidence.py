"""The figures with an interval in the README and in docs/evidence.md stand in a result that is committed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NUMBER = r"([+-]?\d+\.\d+)"
PERCENT = rf"{NUMBER} %[a-z ,]*\((?:95 % interval )?{NUMBER} to {NUMBER}"
PLAIN = r"\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)"  # a perplexity, or a ratio of times
RATIO = r"\| (\d\.\d{3}) \((\d\.\d{3}) to (\d\.\d{3})\) \|"  # of two perplexities, in the tables of pairs
P_VALUE = r"\bp (\d\.\d+)"


def text_of(path):
    """Return a file's text with its lines joined."""
    return " ".join(path.read_text().split())


def percents(text):
    """Return the percentages with their intervals, (mean, low, high)."""
    return {tuple(map(float, found)) for found in re.findall(PERCENT, text)}


@pytest.fixture(scope="module")
def reports():
    """The text of all studies' reports."""
    return " ".join(text_of(path) for path in sorted(RESULTS.glob("studies/*/results.md")))


@pytest.mark.parametrize("name", ["README.md", "docs/evidence.md"])
def test_every_figure_is_in_a_report(name, reports):
    """Of a pair, the reports have one direction as a percentage, and the other as a ratio of three decimals."""
    text = text_of(ROOT / name)
    known = percents(reports)
    known |= {(-mean, -high, -low) for mean, low, high in known}
    lower = [[100 - 100 / float(value) for value in ratio] for ratio in re.findall(RATIO, reports)]
    unknown = [
        figure
        for figure in percents(text) - known
        if not any(figure == pytest.approx(percentages, abs=0.1) for percentages in lower)
    ]
    assert not unknown
    measured = reports + text_of(RESULTS / "gpu.md")
    assert not [figure for figure in re.findall(PLAIN, text) if figure not in measured]
    assert not [value for value in re.findall(P_VALUE, text) if f"p {value}" not in reports]


def test_figures_are_found(reports):
    """So that the test above has something to look at."""
    evidence = text_of(ROOT / "docs" / "evidence.md")
    assert len(percents(evidence)) > 20 and len(re.findall(PLAIN, evidence)) > 15 and re.search(P_VALUE, evidence)
    assert "differs by" in reports and len(re.findall(RATIO, reports)) > 100
