"""How far a route is a table of token ids, beside chance and beside a real table. Shape suffixes: `moe.losses`.

OpenMoE (Xue et al. 2024, arXiv 2402.01739) found that learned routers send a token id mostly to the same experts,
whatever the context. Here P is the number of pairs of a token id and an expert that occur.
"""

from dataclasses import dataclass

import numpy as np

from fairseq_hash.hashing.builders import greedy_experts

SEED = 1  # of the route by chance


@dataclass(frozen=True, eq=False)
class Pairs:
    """How often each token id went to each expert, before dropping; pairs that do not occur are left out.

    Attributes:
        token_P: int64, ascending.
        expert_P: int64, ascending within a token.
        count_P: int64, 1 or more.
    """

    token_P: np.ndarray
    expert_P: np.ndarray
    count_P: np.ndarray

    @classmethod
    def of(cls, token_C: np.ndarray, expert_C: np.ndarray, count_C: "np.ndarray | None" = None) -> "Pairs":
        """Count choices, int64 `[C]` each; `count_C`: how often each was made."""
        experts = int(expert_C.max(initial=0)) + 1
        key_P, place_C = np.unique(token_C * experts + expert_C, return_inverse=True)
        count_P = np.zeros(len(key_P), dtype=np.int64)
        np.add.at(count_P, place_C, 1 if count_C is None else count_C)
        return cls(key_P // experts, key_P % experts, count_P)

    def __add__(self, other: "Pairs") -> "Pairs":
        """Return the pairs of both."""
        both = zip(
            (self.token_P, self.expert_P, self.count_P), (other.token_P, other.expert_P, other.count_P), strict=True
        )
        return Pairs.of(*map(np.concatenate, both))

    @property
    def total(self) -> int:
        """Number of choices."""
        return int(self.count_P.sum())

    def load_E(self, experts: int) -> np.ndarray:
        """Return how often each expert was chosen, int64."""
        return np.bincount(self.expert_P, self.count_P, experts).astype(np.int64)

    def most_frequent_V(self, vocabulary: int) -> np.ndarray:
        """Return each token's most frequent expert, int64: of several the lowest number, -1 where there is none."""
        best_V = np.full(vocabulary, -1, dtype=np.int64)
        order_P = np.lexsort((-self.expert_P, self.count_P))  # what is written last stays
        best_V[self.token_P[order_P]] = self.expert_P[order_P]
        return best_V


@dataclass(frozen=True)
class Overlap:
    """What a token's id says of its expert; each is 1 where the id decides it (`nmi` of a table: less than 1).

    Attributes:
        share: of the choices, those that went to their token's most frequent expert.
        explained: I(token; expert) / H(expert): the share of the experts' entropy that the id takes away.
        nmi: normalized mutual information, 2 I / (H(token) + H(expert)).
    """

    share: float
    explained: float
    nmi: float


def overlap(pairs: Pairs) -> Overlap:
    """Measure a route.

    Rare tokens raise all three: a token that occurs once has but one expert. Compare with `by_chance` of the same text.
    """
    n = pairs.total
    token_V, expert_E = np.bincount(pairs.token_P, pairs.count_P), np.bincount(pairs.expert_P, pairs.count_P)
    best_V = np.zeros(len(token_V), dtype=np.int64)
    np.maximum.at(best_V, pairs.token_P, pairs.count_P)
    expected_P = token_V[pairs.token_P] * expert_E[pairs.expert_P] / n
    information = float((pairs.count_P / n * np.log(pairs.count_P / expected_P)).sum())
    entropies = _entropy(token_V), _entropy(expert_E)
    return Overlap(
        share=float(best_V.sum() / n),
        explained=information / entropies[1] if entropies[1] else 1.0,
        nmi=2 * information / sum(entropies) if sum(entropies) else 1.0,
    )


def by_chance(pairs: Pairs) -> Pairs:
    """Return a route with the same tokens and loads that knows nothing of the ids: its choices are shuffled."""
    token_C, expert_C = np.repeat(pairs.token_P, pairs.count_P), np.repeat(pairs.expert_P, pairs.count_P)
    return Pairs.of(token_C, np.random.default_rng(SEED).permutation(expert_C))


def by_table(pairs: Pairs, vocabulary: int, experts: int) -> Pairs:
    """Return the route of the same tokens by a balanced hash table of this text, one expert for each token."""
    count_V = np.bincount(pairs.token_P, pairs.count_P, vocabulary).astype(np.int64)
    expert_V = greedy_experts(count_V, count_V, np.zeros(experts, dtype=np.int64), 1)[:, 0]
    (token_P,) = np.nonzero(count_V)
    return Pairs.of(token_P, expert_V[token_P], count_V[token_P])


def agreement(pairs: Pairs, other: Pairs, vocabulary: int) -> float:
    """Return the share of the choices in `pairs` whose token has the same most frequent expert in `other`."""
    is_same_V = pairs.most_frequent_V(vocabulary) == other.most_frequent_V(vocabulary)
    return float(pairs.count_P[is_same_V[pairs.token_P]].sum() / pairs.total)


def _entropy(count_N: np.ndarray) -> float:
    share_N = count_N[count_N > 0] / count_N.sum()
    return float(-(share_N * np.log(share_N)).sum())
