"""What a study says of its models beside n-gram models."""

import dataclasses

import pytest
from made_report import results_of
from made_study import made_facts, made_runs_of_study, made_study

from fairseq_hash.studies import charts
from fairseq_hash.studies.ngram_lines import NGRAMS, beside_longer_ngrams, beside_the_trigram
from fairseq_hash.studies.results import gather


@pytest.mark.parametrize(
    ("trigram", "said"),
    [
        (4.6, "All models are below (better than) the trigram's perplexity of 99.48."),
        (4.45, "of 85.63: Hash, Hash, balanced. Above (worse): Dense, Twin, Switch. A comparison"),
        (4.0, "All models are above (worse than) the trigram's perplexity of 54.60. A comparison"),
    ],
)
def test_beside_the_trigram(trigram, said):
    """Which models are below the trigram, by the mean of nats; what is above it proves little."""
    words = beside_the_trigram(results_of(trigram=trigram))
    assert said in words and ("proves little" in words) == (trigram < 4.6)
    assert "bigram" not in words


def test_models_above_even_the_bigram():
    facts = made_facts(4.0)
    of_both = {subset: counted | {"2": 4.51} for subset, counted in facts.ngrams.items()}
    results = gather(made_study(), dataclasses.replace(facts, ngrams=of_both), made_runs_of_study())
    assert beside_the_trigram(results).endswith("Above even the bigram's perplexity of 90.92: Dense, Twin.")


@pytest.mark.parametrize(
    ("nats", "said"),
    [
        ({}, ""),
        ({"4": 4.65, "5": 4.7}, ""),  # the trigram is the best
        ({"4": 4.45, "5": 4.5}, "of 4 tokens, has a perplexity of 85.63. Hash, Hash, balanced are below it."),
        ({"4": 4.45, "5": 4.423}, "of 5 tokens, has a perplexity of 83.35. Hash is below it."),
        ({"4": 4.45, "5": 4.0, "6": 4.1}, "of 5 tokens, has a perplexity of 54.60. No model is below it."),
    ],
)
def test_beside_longer_ngrams(nats, said):
    """The best n-gram model is named if it is no trigram; in the charts it stands beside the trigram."""
    facts = made_facts()
    of_both = {subset: counted | nats for subset, counted in facts.ngrams.items()}
    results = gather(made_study(), dataclasses.replace(facts, ngrams=of_both), made_runs_of_study())
    words = beside_longer_ngrams(results)
    assert said in words and (words == "") == (said == "")
    best = min(of_both["valid"], key=of_both["valid"].get)
    levels = [line.name for line in charts.perplexity_charts(results)[0].lines if line.name.startswith("Kneser")]
    assert levels == list(dict.fromkeys([NGRAMS["3"], NGRAMS[best]]))
