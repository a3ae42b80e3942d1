"""What counting reaches on a study's tokens: the level that stands beside the models in tables and curves, in words.

An n-gram model is counted from exactly the training tokens, with interpolated modified Kneser-Ney smoothing
(`experiments.ngrams`). It has no seeds, so its perplexity has no interval; its lead over a trained model has one.
"""

import math

import numpy as np

from fairseq_hash.experiments.ngrams import LONGEST
from fairseq_hash.studies.breakdowns import nats_by_frequency, per_token_by_frequency
from fairseq_hash.studies.leads import LeadCurve, curve_over, lead
from fairseq_hash.studies.results import ModelResult, Results, means_of
from fairseq_hash.studies.statistics import Interval, t_interval

BIGRAM, TRIGRAM = "2", "3"
NGRAMS = {str(order): f"Kneser-Ney, {order} token{'s'[: order > 1]}" for order in range(1, LONGEST + 1)}
NGRAMS[TRIGRAM] += " (trigram)"


def counted(results: Results, subset: str) -> dict[str, float]:
    """Return nats per token of a subset, "valid" or "test", by order, from one token up."""
    known = results.facts.ngrams.get(subset, {})
    return {order: known[order] for order in NGRAMS if order in known}


def best_ngram(results: Results, subset: str) -> "str | None":
    """Return the order of the n-gram model that has the lowest perplexity on a subset, None if none was counted."""
    known = counted(results, subset)
    return min(known, key=known.__getitem__, default=None)


def ngrams_of_charts(results: Results, subset: str) -> dict[str, float]:
    """Return nats per token of the n-gram models that charts show: the trigram and the best one."""
    known, best = counted(results, subset), best_ngram(results, subset)
    return {order: known[order] for order in known if order in (TRIGRAM, best)}


def levels(results: Results, subset: str) -> str:
    """Return in words the nats per token of all n-gram models, "" if none was counted."""
    known = counted(results, subset)
    if not known:
        return ""
    words = [f"{nats:.3f} ({order} token{'s'[: order != '1']})" for order, nats in known.items()]
    return f"Counting has, in nats per token of {subset}: {', '.join(words)}."


def lead_of(results: Results, nats: float) -> Interval:
    """Return in percent the lead of an n-gram model over the baseline on test, with its interval over the seeds."""
    return lead(t_interval([nats - own for own in results.baseline.test_nats.values()]))


def lead_curves_of(results: Results, over: ModelResult) -> dict[str, LeadCurve]:
    """Return by order the leads of n-gram models over a trained model on valid, as its training goes on."""
    known = {order: curve_over(over, nats) for order, nats in counted(results, "valid").items()}
    return {order: curve for order, curve in known.items() if curve is not None}


def beside_baseline_by_frequency(results: Results) -> dict[str, np.ndarray]:
    """Return by order an n-gram model's nats minus the mean of the baseline's over its seeds, by range of counts."""
    baseline = nats_by_frequency(results, results.baseline)
    if not baseline:
        return {}
    mean, sums = np.mean(list(baseline.values()), axis=0), results.facts.ngram_frequency_nats
    return {order: per_token_by_frequency(results.facts, sums[order]) - mean for order in NGRAMS if order in sums}


def beside_the_trigram(results: Results) -> str:
    """Return in words which models have a lower perplexity on test than the trigram, and which do not."""
    known = counted(results, "test")
    if TRIGRAM not in known or not results.finished:
        return ""
    means = means_of(results)
    below = [name for name, nats in means.items() if nats < known[TRIGRAM]]
    above = [name for name in means if name not in below]
    level = f"the trigram's perplexity of {math.exp(known[TRIGRAM]):.2f}"
    waiting = len(results.models) - len(results.finished)
    every = f"All models that have final runs, {len(means)} of {len(results.models)}," if waiting else "All models"
    if not above:
        return f"{every} are below (better than) {level}."
    little = "A comparison of models that lose against counts of three tokens proves little: they still learn what "
    little += "counting finds, and their order may change once they use more context."
    if BIGRAM in known and (lost := [name for name in above if means[name] >= known[BIGRAM]]):
        little += f" Above even the bigram's perplexity of {math.exp(known[BIGRAM]):.2f}: {', '.join(lost)}."
    if not below:
        return f"{every} are above (worse than) {level}. {little}"
    return f"Below (better than) {level}: {', '.join(below)}. Above (worse): {', '.join(above)}. {little}"


def beside_longer_ngrams(results: Results) -> str:
    """Return in words which models have a lower perplexity on test than the best n-gram model, if it is no trigram."""
    order = best_ngram(results, "test")
    if order is None or int(order) <= int(TRIGRAM) or not results.finished:
        return ""
    nats = counted(results, "test")[order]
    below = [name for name, mean in means_of(results).items() if mean < nats]
    who = "No model is" if not below else f"{', '.join(below)} {'is' if len(below) == 1 else 'are'}"
    return (
        f"Counts of more tokens do better: the best n-gram model, of {order} tokens, has a perplexity of "
        f"{math.exp(nats):.2f}. {who} below it. A model above it predicts this text less well than counting does."
    )
