"""N-gram lines beside a naive count model of exact fractions, and the command `fairseq-hash ngrams`."""

import json
import math
import shutil
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
from called import call, refused
from fairseq.data import Dictionary, TokenBlockDataset, data_utils

from fairseq_hash.core.errors import UserError
from fairseq_hash.experiments import ngrams
from fairseq_hash.experiments.ngrams import (
    FALLBACK,
    KneserNey,
    check_size,
    estimate_discounts,
    orders_that_fit,
    read_stream,
)
from fairseq_hash.hashing import dictionary

UNKNOWN = 3


class Naive:
    """Interpolated modified Kneser-Ney as its definition says it, with a dictionary for each order."""

    def __init__(self, stream, order, vocabulary):
        self.order, self.vocabulary = order, vocabulary
        stream = [2] * (order - 1) + list(stream)
        ends = range(order, len(stream) + 1)
        self.followers, self.discounts = [], []
        for length in range(1, order + 1):
            if length == order:
                counts = Counter(tuple(stream[end - length : end]) for end in ends)
            else:
                before = defaultdict(set)
                for end in ends:
                    before[tuple(stream[end - length : end])].add(stream[end - length - 1])
                counts = {ngram: len(tokens) for ngram, tokens in before.items()}
            followers = defaultdict(dict)
            for ngram, count in counts.items():
                followers[ngram[:-1]][ngram[-1]] = count
            self.followers.append(followers)
            self.discounts.append(self.discounts_of(list(counts.values())))

    @staticmethod
    def discounts_of(counts):
        n = [Fraction(counts.count(number)) for number in range(5)]
        fallback = [Fraction(1, 2), Fraction(1), Fraction(3, 2)]
        if 0 in n[1:]:
            return fallback
        found = [k - (k + 1) * n[1] / (n[1] + 2 * n[2]) * n[k + 1] / n[k] for k in (1, 2, 3)]
        return found if min(found) > 0 else fallback

    def probability(self, context, token):
        """Of a token after the tokens before it, of which the last `order` - 1 or fewer are given."""
        if context is None:
            return Fraction(1, self.vocabulary)
        lower = self.probability(context[1:] if context else None, token)
        counts = self.followers[len(context)].get(context)
        if counts is None:
            return lower
        discount = self.discounts[len(context)]
        subtracted = {word: discount[min(count, 3) - 1] for word, count in counts.items()}
        own = counts[token] - subtracted[token] if token in counts else 0
        return (own + sum(subtracted.values()) * lower) / sum(counts.values())

    def token_nats(self, stream):
        stream, width = [2] * (self.order - 1) + list(stream), self.order - 1
        ends = range(width, len(stream))
        return [-math.log(self.probability(tuple(stream[end - width : end]), stream[end])) for end in ends]

    def nats(self, stream):
        return math.fsum(self.token_nats(stream)) / len(stream)


def drawn(seed, tokens, vocabulary):
    """Tokens by Zipf's law of ids from 4 up, some of them after one another more often, and `</s>` (2)."""
    random = np.random.default_rng(seed)
    weight = 1 / np.arange(1, vocabulary - 3) ** 1.3
    stream = random.choice(np.arange(4, vocabulary), size=tokens, p=weight / weight.sum())
    stream[random.random(tokens) < 0.1] = 2
    follows = np.flatnonzero(random.random(tokens - 1) < 0.4) + 1
    stream[follows] = stream[follows - 1] // 2 + 3
    return stream


@pytest.mark.parametrize("order", [1, 2, 3, 5, 6])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(2000, 300), (300, 30), (40, 12), (2, 8)])
def test_perplexity_is_that_of_a_naive_model(order, tokens, vocabulary, monkeypatch):
    """Exact to 1e-9, in blocks of any size; the held-out text has <unk>, other unseen tokens, and seen n-grams."""
    for seed in range(3):
        training = drawn(seed, tokens, vocabulary)
        held_out = np.concatenate([drawn(seed + 9, 200, vocabulary), training[:50], [UNKNOWN, 4, UNKNOWN, UNKNOWN, 2]])
        assert UNKNOWN not in training and len(np.setdiff1d(held_out, training)) > 1
        model, naive = KneserNey(training, order, vocabulary), Naive(training, order, vocabulary)
        for level, discount in zip(model.levels, naive.discounts, strict=True):
            assert level.discounts.values == pytest.approx([float(value) for value in discount], rel=1e-12)
        monkeypatch.setattr(ngrams, "BLOCK", 1 << 20 if seed else 7)
        nats_S = model.token_nats(held_out)
        assert nats_S.dtype == np.float64 and nats_S == pytest.approx(np.array(naive.token_nats(held_out)), rel=1e-9)
        assert math.exp(model.nats(held_out)) == pytest.approx(math.exp(naive.nats(held_out)), rel=1e-9)


def test_both_kinds_of_discounts_are_tested():
    """The larger streams above have estimated ones in all orders, the smaller ones none."""
    for order in (1, 2, 3):
        assert all(level.discounts.estimated for level in KneserNey(drawn(0, 2000, 300), order, 300).levels)
        assert not any(level.discounts.estimated for level in KneserNey(drawn(0, 2, 8), order, 8).levels)


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param([1, 1, 1, 2, 2, 3], id="none of 4"),
        pytest.param([2, 3, 4], id="none of 1"),
        pytest.param([7], id="one n-gram"),
        pytest.param([1] * 9 + [2] + [3] * 9 + [4], id="below 0"),
        pytest.param([1, 1, 2, 2] + [3] * 4 + [4], id="exactly 0"),
    ],
)
def test_discounts_that_cannot_be_estimated(counts):
    found = estimate_discounts(np.array(counts))
    assert (found.values, found.estimated) == (FALLBACK, False)


@pytest.mark.parametrize("tokens", [1, 5, 40, 3000])
def test_probabilities_sum_to_one(tokens):
    """Over the whole dictionary, after contexts seen and unseen; each is above 0."""
    vocabulary, random = 50, np.random.default_rng(1)
    training = drawn(0, tokens, vocabulary)
    for order in (1, 2, 3):
        model = KneserNey(training, order, vocabulary)
        contexts = random.integers(0, vocabulary, (30, order - 1))
        if tokens > 2:
            starts = random.integers(0, tokens - order + 1, 30)
            contexts = np.concatenate([contexts, [training[start : start + order - 1] for start in starts]])
        for context in contexts.astype(np.int64):
            rows = np.column_stack([np.tile(context, (vocabulary, 1)), np.arange(vocabulary)])
            probability = model.probabilities(rows)
            assert probability.min() > 0 and probability.sum() == pytest.approx(1, abs=1e-12)


def test_the_largest_dictionary():
    """Keys of the last ids do not overflow at 2^21 - 1 symbols; one more is refused."""
    most = (1 << 21) - 1
    stream = np.array([most - 1, most - 1, most - 1, most - 2])
    assert KneserNey(stream, 3, most).nats(stream) == pytest.approx(Naive(stream, 3, most).nats(stream), rel=1e-9)
    with pytest.raises(UserError, match=r"2,097,152 symbols; n-grams of 3 tokens are counted for at most 2,097,151"):
        KneserNey(stream, 3, most + 1)


def test_orders_that_fit():
    """As many tokens as int64 holds, at most six: with Python's own integers."""
    for vocabulary in (3, 404, 1448, 1449, 8004, 32004, 55108, 55109, (1 << 21) - 1):
        fitting = [order for order in range(1, 7) if vocabulary**order <= 2**63 - 1]
        assert list(orders_that_fit(vocabulary)) == fitting
        for order in range(1, 7):
            if order not in fitting:
                with pytest.raises(UserError, match=f"n-grams of {order} tokens are counted for at most"):
                    check_size(vocabulary, order)


def test_a_limited_stream():
    blocks = [np.arange(4), np.arange(4, 8), np.arange(8, 10)]
    for limit in (1, 3, 4, 5, 8, 9, 10, 11, None):
        assert read_stream(iter(blocks), limit).tolist() == list(range(10))[:limit]


def of_fairseq(data, subset):
    """The targets of fairseq's samples, and the first token that it gives a model."""
    symbols = Dictionary.load(str(data / "dict.txt"))
    lines = data_utils.load_indexed_dataset(str(data / subset), symbols)
    cut = {"pad": 1, "eos": symbols.eos(), "break_mode": "none", "include_targets": True}
    blocks = TokenBlockDataset(lines, lines.sizes, 32, **cut)
    samples = [blocks[number] for number in range(len(blocks))]
    targets = [token for _, target, _ in samples for token in target.tolist()]
    return targets, int(samples[0][0][0]), len(symbols)


def written(data, tmp_path, *options):
    status, out, err = call("ngrams", data, *options, "--json", tmp_path / "lines.json")
    assert status == 0, err
    return json.loads((tmp_path / "lines.json").read_text()), out, err


def test_command_predicts_what_fairseq_predicts(data, tmp_path):
    record, out, err = written(data, tmp_path, "--subset", "valid", "test", "--tokens", 1000, "--order", 5)
    training = of_fairseq(data, "train")[0][:1000]
    lines = [(line["subset"], line["order"]) for line in record["lines"]]
    assert lines == [(subset, order) for subset in ("valid", "test") for order in (1, 2, 3, 4, 5)]
    for line in record["lines"]:
        held_out, first, vocabulary = of_fairseq(data, line["subset"])
        assert first == 2 and record["vocabulary"] == vocabulary
        naive = Naive(training, line["order"], vocabulary).nats(held_out)
        assert (line["tokens"], line["training_tokens"]) == (len(held_out), 1000)
        assert line["nats"] == pytest.approx(naive, rel=1e-9)
        assert line["perplexity"] == pytest.approx(math.exp(naive), rel=1e-9)
        row = f"{line['subset']} {line['order']} {line['perplexity']:.2f} {naive:.4f} {len(held_out)} 1,000"
        assert row in [" ".join(printed.split()) for printed in out.splitlines()]
    assert record["provenance"]["numpy"] == np.__version__ and record["data"] == str(data)
    assert "n-grams of order 5" in err and f"wrote {tmp_path / 'lines.json'}" in out
    # The corpus's words are drawn with successors of their own, and 60 words do not occur only once to four times.
    assert record["lines"][1]["nats"] < record["lines"][0]["nats"] - 0.1
    assert "note: in the model of order 1 too few n-grams of order 1 were seen 1 to 4 times to estimate" in out


def test_all_training_tokens_unless_told(data, tmp_path):
    """With a note where there are fewer than told."""
    training, _, _ = of_fairseq(data, "train")
    everything, out, err = written(data, tmp_path)
    assert {(line["subset"], line["training_tokens"]) for line in everything["lines"]} == {("valid", len(training))}
    assert [line["order"] for line in everything["lines"]] == [1, 2, 3]
    assert "note" not in err
    more, _, err = written(data, tmp_path, "--tokens", 10**7)
    assert more["lines"] == everything["lines"]
    assert f"note: train has {len(training):,} tokens, fewer than --tokens 10,000,000; all are counted" in err


def test_bad_input_gets_one_line(data, tmp_path, monkeypatch):
    assert "invalid int value: 'many'" in refused("ngrams", data, "--tokens", "many", status=2)
    missing = tmp_path / "none" / "lines.json"
    number = "give the number of tokens of train to count, 1 or more"
    for words, line in (
        ((data, "--tokens", 0), f"--tokens is 0; {number}"),
        ((data, "--tokens", -3), f"--tokens is -3; {number}"),
        ((data, "--order", 0), "--order 0 is out of range; give a number from 1 to 6"),
        ((data, "--order", 7), "--order 7 is out of range; give a number from 1 to 6"),
        ((tmp_path / "none",), f"{tmp_path}/none is no folder; give one that fairseq-preprocess or data_prep wrote"),
        ((data, "--json", missing), f"--json {missing} cannot be written; give a file in a folder that exists"),
    ):
        assert refused("ngrams", *words) == f"fairseq-hash: {line}"
    assert f"{tmp_path / 'dict.txt'} does not exist" in refused("ngrams", tmp_path)
    assert f"{data} has no dev.idx" in refused("ngrams", data, "--subset", "valid", "dev")
    for name in ("valid.bin", "valid.idx", "dict.txt"):
        shutil.copy(data / name, tmp_path)
    assert f"{tmp_path} has no train.idx" in refused("ngrams", tmp_path)
    monkeypatch.setattr(dictionary, "read_dictionary", lambda path: (["many"] * (1 << 21), []))
    assert "n-grams of 3 tokens are counted for at most 2,097,151" in refused("ngrams", data)
