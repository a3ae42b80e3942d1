"""The demo's n-gram lines: what is counted, and what is said of the models beside them."""

import importlib
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from fairseq_hash.experiments.ngrams import Line

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def demo_ngrams(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("demo_ngrams")


def line(subset, order, perplexity):
    return Line(subset, order, 100, 5000, math.log(perplexity), perplexity, ())


LINES = [line("valid", 2, 1.0), line("test", 1, 90.0), line("test", 2, 26.0), line("test", 3, 15.0)]


@pytest.mark.parametrize(
    ("perplexities", "said"),
    [
        ({"dense": [25.0, 24.0], "hash": [14.0]}, " bigram. The best of these n-grams is better than dense."),
        ({"dense": [14.5], "hash": [14.0]}, "Every model is below (better than) the bigram."),
        ({"dense": [27.0, 26.0], "hash": [20.0]}, "Above the bigram, and so no evidence on routers: dense."),
    ],
)
def test_models_stand_beside_the_bigram(demo_ngrams, monkeypatch, perplexities, said):
    runs = {
        name: [SimpleNamespace(evaluations={"test": SimpleNamespace(perplexity=value)}) for value in values]
        for name, values in perplexities.items()
    }
    monkeypatch.setattr(demo_ngrams, "group_by_model", lambda given: runs)
    text = demo_ngrams.beside_ngrams(LINES, [run for own in runs.values() for run in own])
    assert "counted from 5,000 training tokens" in text and text.endswith(said)
    assert "90.0 of 1 token, 26.0 of 2 tokens, 15.0 of 3 tokens" in text
