"""N-gram lines: the perplexity of n-gram models on the tokens on which a language model is evaluated.

Modified Kneser-Ney, interpolated: S. F. Chen and J. Goodman, An empirical study of smoothing techniques for language
modeling, Computer Speech & Language 13 (1999), 359-394. The lowest order is interpolated with the uniform distribution
over the dictionary, as in K. Heafield et al., Scalable modified Kneser-Ney language model estimation, ACL 2013.

Shape suffixes: S tokens of a stream, G different n-grams of one order, C their different contexts, O order of the
model.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.progress import Display
from fairseq_hash.hashing.dictionary import END

ORDER, LONGEST = 3, 6  # of the n-grams that are counted by default, and at most
FALLBACK = (0.5, 1.0, 1.5)  # KenLM's --discount_fallback
BLOCK = 1 << 20  # tokens that are evaluated at once


@dataclass(frozen=True)
class Discounts:
    """What an order subtracts from the counts of n-grams that occur once, twice, and more often.

    The discount of a count k is above 0 and at most k. If they were not estimated from the counts they are FALLBACK.
    """

    values: tuple[float, float, float]
    estimated: bool


@dataclass(frozen=True)
class Level:
    """One order of a model. N-grams and contexts are stored as keys: their ids are the digits of a number with base V.

    Attributes:
        key_G: int64, ascending.
        share_G: float64, the discounted count of an n-gram divided by the count of its context.
        context_C: int64, ascending.
        weight_C: float64, the weight of the order below after a context.
    """

    key_G: np.ndarray
    share_G: np.ndarray
    context_C: np.ndarray
    weight_C: np.ndarray
    discounts: Discounts


@dataclass(frozen=True)
class Line:
    """The result of a model of one order on one subset, of which all tokens are predicted.

    `nats` is the mean of minus the natural logarithm of a token's probability, and the perplexity e to that power. The
    discounts are those of the orders from 1 up.
    """

    subset: str
    order: int
    tokens: int
    training_tokens: int
    nats: float
    perplexity: float
    discounts: tuple[Discounts, ...]


class KneserNey:
    """An n-gram model of one order, with a level for each order from 1 up.

    The highest level uses true counts, lower levels the number of different preceding tokens.
    """

    def __init__(self, id_S: np.ndarray, order: int, vocabulary: int) -> None:
        """Count a stream. `</s>` are put before its first token, so that every token has a full context.

        `id_S` are integers `[S]`, 0 to V - 1, at least one.

        Raises:
            UserError: if n-grams of this many symbols do not fit into int64.
        """
        check_size(vocabulary, order)
        self.order, self.vocabulary, self.training_tokens = order, vocabulary, len(id_S)
        key_S = np.zeros(len(id_S), dtype=np.int64)
        padded_S = padded(id_S, order)
        for place in range(order):
            key_S *= vocabulary
            key_S += padded_S[place : place + len(id_S)]
        key_G, count_G = np.unique(key_S, return_counts=True)
        levels = [make_level(key_G, count_G, vocabulary)]
        for length in range(order - 1, 0, -1):
            # Each different n-gram counts once for the n-gram without its first token.
            key_G, count_G = np.unique(key_G % vocabulary**length, return_counts=True)
            levels.insert(0, make_level(key_G, count_G, vocabulary))
        self.levels = tuple(levels)

    def probabilities(self, id_SO: np.ndarray) -> np.ndarray:
        """Return the probability of each row's last token (of `[S, O]`) after the others, float64 `[S]`, above 0."""
        probability_S = np.full(len(id_SO), 1 / self.vocabulary)
        for length, level in enumerate(self.levels, 1):
            context_S = np.zeros(len(id_SO), dtype=np.int64)
            for place in range(self.order - length, self.order - 1):
                context_S = context_S * self.vocabulary + id_SO[:, place]
            key_S = context_S * self.vocabulary + id_SO[:, -1]
            probability_S *= looked_up(level.context_C, level.weight_C, context_S, 1.0)
            probability_S += looked_up(level.key_G, level.share_G, key_S, 0.0)
        return probability_S

    def token_nats(self, id_S: np.ndarray) -> np.ndarray:
        """Return minus the natural logarithm of each token's probability in a stream `[S]`, float64 `[S]`.

        As in fairseq-eval-lm with --sample-break-mode none, the first token comes after `</s>`. A language model sees
        less before the first tokens of its other samples, but an n-gram model sees O - 1 tokens before each token.
        """
        id_SO = np.lib.stride_tricks.sliding_window_view(padded(id_S, self.order), self.order)
        nats_S = np.empty(len(id_S))
        for first in range(0, len(id_S), BLOCK):
            block = slice(first, first + BLOCK)
            nats_S[block] = -np.log(self.probabilities(id_SO[block]))
        return nats_S

    def nats(self, id_S: np.ndarray) -> float:
        """Return the mean of `token_nats` over a stream `[S]` of one token or more."""
        return float(self.token_nats(id_S).mean())


def orders_that_fit(vocabulary: int) -> tuple[int, ...]:
    """Return the orders from 1 to `LONGEST` whose n-grams of V symbols fit into int64."""
    return tuple(order for order in range(1, LONGEST + 1) if vocabulary**order < 1 << 63)


def check_size(vocabulary: int, order: int) -> None:
    """Refuse a vocabulary of V symbols that is too large.

    Raises:
        UserError: if n-grams of this many symbols do not fit into int64.
    """
    if vocabulary**order >= 1 << 63:
        most = round((1 << 63) ** (1 / order)) - 1
        raise UserError(
            f"the dictionary has {vocabulary:,} symbols; n-grams of {order} tokens are counted for at most {most:,}"
        )


def estimate_discounts(count_G: np.ndarray) -> Discounts:
    """Return the discounts of one order from its counts, int64, above 0.

    A small text may lack n-grams of some count from 1 to 4, or may not have fewer n-grams of the larger counts. Then a
    discount is not defined or not above 0, and some token would have no probability, so all three are FALLBACK.
    """
    _, n1, n2, n3, n4, _ = np.bincount(np.minimum(count_G, 5), minlength=6).tolist()
    if min(n1, n2, n3, n4) == 0:
        return Discounts(FALLBACK, False)
    ratio = n1 / (n1 + 2 * n2)
    values = (1 - 2 * ratio * n2 / n1, 2 - 3 * ratio * n3 / n2, 3 - 4 * ratio * n4 / n3)
    return Discounts(values, True) if min(values) > 0 else Discounts(FALLBACK, False)


def make_level(key_G: np.ndarray, count_G: np.ndarray, vocabulary: int) -> Level:
    """Return one order from its n-grams, ascending, and their counts."""
    discounts = estimate_discounts(count_G)
    discount_G = np.array([0.0, *discounts.values])[np.minimum(count_G, 3)]
    context_G = key_G // vocabulary
    first_C = np.flatnonzero(np.diff(context_G, prepend=-1))
    total_C = np.add.reduceat(count_G, first_C)
    share_G = (count_G - discount_G) / np.repeat(total_C, np.diff(first_C, append=len(key_G)))
    return Level(key_G, share_G, context_G[first_C], np.add.reduceat(discount_G, first_C) / total_C, discounts)


def looked_up(known_G: np.ndarray, value_G: np.ndarray, key_S: np.ndarray, other: float) -> np.ndarray:
    """Return each key's value, float64 `[S]`, or `other` if the (ascending) known keys lack it."""
    place_S = np.minimum(np.searchsorted(known_G, key_S), len(known_G) - 1)
    return np.where(known_G[place_S] == key_S, value_G[place_S], other)


def padded(id_S: np.ndarray, order: int) -> np.ndarray:
    """Return a stream with `</s>` before its first token, int64 `[order - 1 + S]`."""
    return np.concatenate([np.full(order - 1, END, dtype=np.int64), np.asarray(id_S, dtype=np.int64)])


def read_stream(blocks: Iterable[np.ndarray], limit: "int | None" = None) -> np.ndarray:
    """Return the blocks of a text as one stream, int64 `[S]`, or its first `limit` tokens."""
    read: list[np.ndarray] = []
    for block_S in blocks:
        read.append(block_S)
        if limit is not None and sum(map(len, read)) >= limit:
            break
    return np.concatenate(read)[:limit]


def ngram_lines(
    training_S: np.ndarray,
    held_out: Mapping[str, np.ndarray],
    vocabulary: int,
    orders: Sequence[int],
    display: Display,
) -> list[Line]:
    """Count a model of each order and evaluate it on each subset.

    Tokens are integers `[S]`, 0 to V - 1, V the vocabulary. The display gets one unit of work per order. The lines of
    the first subset come in the order of `orders`, then those of the next. Raises `UserError` if n-grams of this many
    symbols do not fit into int64.
    """
    lines: dict[str, list[Line]] = {subset: [] for subset in held_out}
    for order in orders:
        display.begin(f"n-grams of order {order}", 1)
        model = KneserNey(training_S, order, vocabulary)
        for subset, id_S in held_out.items():
            display.detail(subset)
            nats, discounts = model.nats(id_S), tuple(level.discounts for level in model.levels)
            lines[subset].append(Line(subset, order, len(id_S), len(training_S), nats, math.exp(nats), discounts))
        display.end(f"{len(model.levels[-1].key_G):,} different ones")
    return [line for of_subset in lines.values() for line in of_subset]
