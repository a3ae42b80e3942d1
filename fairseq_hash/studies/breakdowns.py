"""Where on test the nats are: by the token's position in its sample, and by its count in the training text."""

import numpy as np

from fairseq_hash.studies.records import TextFacts
from fairseq_hash.studies.results import ModelResult, Results

# A mean over fewer tokens of test says little, and would fill the figure. Such a range joins the next one.
ENOUGH_TOKENS = 200


def position_ranges(length: int) -> list[tuple[int, int]]:
    """Return ranges of positions [start, stop) from 0: 1, 1, 2, 4, 8, ... positions, the last one cut at the length."""
    ranges = [(0, 1)]
    while ranges[-1][1] < length:
        start = ranges[-1][1]
        ranges.append((start, min(2 * start, length)))
    return ranges


def position_labels(length: int) -> list[str]:
    """Return the ranges for readers, counted from 1: `1`, `2`, `3-4`, `5-8`."""
    return [f"{start + 1}" if stop == start + 1 else f"{start + 1}-{stop}" for start, stop in position_ranges(length)]


def nats_by_position(results: Results, result: ModelResult) -> np.ndarray:
    """Return the mean over the seeds of nats per token in each range of positions; NaN for a range without tokens."""
    starts = [start for start, _ in position_ranges(results.facts.tokens_per_sample)]
    means = []
    for scores in result.scores.values():
        nats, tokens = (np.add.reduceat(of, starts) for of in (scores.position_nats, scores.position_tokens))
        means.append(_ratio(nats, tokens))
    return np.mean(means, axis=0)


def gain_from_context(by_position: np.ndarray) -> "float | None":
    """Return by how many nats the last range is below that of positions 3 and 4; None if that is the last one.

    From position 3 on a trigram has all the context that it can use. What a model gains beyond is of farther tokens.
    """
    return float(by_position[2] - by_position[-1]) if len(by_position) > 3 else None


def frequency_ranges(facts: TextFacts) -> list[tuple[int, int]]:
    """Return the ranges of counts as [start, stop) of the recorded ones, each with enough tokens of test.

    A recorded range with too few joins the next one up. At the end, what is left joins the range before it.
    """
    stops, tokens = [], 0
    for stop, of_range in enumerate(facts.frequency_tokens, 1):
        tokens += of_range
        if tokens >= ENOUGH_TOKENS:
            stops.append(stop)
            tokens = 0
    stops = [*stops[:-1], len(facts.frequency_tokens)]
    return list(zip([0, *stops[:-1]], stops, strict=True))


def frequency_labels(facts: TextFacts) -> list[str]:
    """Return the ranges of counts for readers: `0-99`, `100-999`."""
    labels = facts.frequency_labels
    return [
        labels[start] if stop == start + 1 else f"{labels[start].split('-')[0]}-{labels[stop - 1].split('-')[-1]}"
        for start, stop in frequency_ranges(facts)
    ]


def frequency_tokens(facts: TextFacts) -> np.ndarray:
    """Return the tokens of test in each range of counts."""
    return _by_range(facts, facts.frequency_tokens)


def nats_by_frequency(results: Results, result: ModelResult) -> dict[int, np.ndarray]:
    """Return nats per token in each range of counts, by seed; NaN for a range without tokens."""
    facts = results.facts
    return {seed: per_token_by_frequency(facts, scores.frequency_nats) for seed, scores in result.scores.items()}


def beside_baseline_by_frequency(results: Results, result: ModelResult) -> "np.ndarray | None":
    """Return a model's nats minus those of the baseline in each range, mean over the seeds that both have, or None."""
    own, baseline = nats_by_frequency(results, result), nats_by_frequency(results, results.baseline)
    differences = [own[seed] - baseline[seed] for seed in own if seed in baseline]
    return np.mean(differences, axis=0) if differences else None


def per_token_by_frequency(facts: TextFacts, nats: "list[float]") -> np.ndarray:
    """Return nats per token in each range of counts, given the sums of the recorded ones; NaN without tokens."""
    return _ratio(_by_range(facts, nats), frequency_tokens(facts))


def _by_range(facts: TextFacts, of_recorded: "list[float] | list[int]") -> np.ndarray:
    return np.array([np.sum(of_recorded[start:stop]) for start, stop in frequency_ranges(facts)])


def _ratio(nats: "np.ndarray | list[float]", tokens: "np.ndarray | list[int]") -> np.ndarray:
    tokens = np.asarray(tokens, dtype=float)
    return np.divide(nats, tokens, out=np.full(len(tokens), np.nan), where=tokens > 0)
