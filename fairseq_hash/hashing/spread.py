"""Spread tables (ours): the few tokens that overload an expert get one row for each token before them.

If a token's share of the text exceeds K / E, no table over single tokens can balance the experts
(`balance.lower_bound`). Here such a heavy token has a row for each pair with the token before it. All other tokens keep
their one row.

Rows 0 to V - 1 belong to the tokens, row V + i to the i-th pair. A pair that the building text does not have uses the
row of the token before it, so these pairs are spread over the experts, too.

`index` of such a table: `heavy`, bool `[V]`: which tokens have pairs; `pair`, int64 `[P]`, ascending: token x V +
previous token.

`counts`, `[V]`, say how often each token occurs in a text. Its pairs are a heavy token and the token before it: token x
V + previous token, ascending, and how often each occurs; both int64 `[P]`.

Shape suffixes: see `moe.losses`; P is the number of pairs, S the number of tokens in a text.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing.balance import expert_loads, filling_bound, judge
from fairseq_hash.hashing.builders import check_counts, greedy_experts
from fairseq_hash.hashing.mixing import Integers
from fairseq_hash.hashing.table import HashTable, counts_fingerprint

BLOCK = 2**24  # tokens at a time, which bounds memory
NO_PAIRS = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)


def heavy_tokens(counts: Integers, num_experts: int, columns: int = 1) -> np.ndarray:
    """Return which tokens overload an expert in any table (bool `[V]`).

    Those whose count exceeds the mean load K N / E.

    Raises:
        UserError: if the counts carry no information.
    """
    count_V = check_counts(counts)
    return count_V > columns * int(count_V.sum()) / num_experts


def count_pairs(token_S: Integers, heavy_V: np.ndarray, padding: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Count the pairs of a heavy token and the token before it.

    `token_S` are the ids of the text in its order. `padding` counts as the token before the first one.
    """
    token_S = np.asarray(token_S, dtype=np.int64)
    pairs = NO_PAIRS
    for start in range(0, len(token_S), BLOCK):
        block_S = token_S[start : start + BLOCK]
        before = token_S[start - 1] if start else padding
        pairs = add_pairs(pairs, block_S, np.concatenate([[before], block_S[:-1]]), heavy_V)
    return pairs


def add_pairs(
    pairs: tuple[np.ndarray, np.ndarray], token_S: np.ndarray, previous_S: np.ndarray, heavy_V: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Add the pairs of some more text (heavy tokens with the token before them) to pairs already counted."""
    places = np.flatnonzero(heavy_V[token_S])
    new_P, new_count_P = np.unique(token_S[places] * len(heavy_V) + previous_S[places], return_counts=True)
    pair_P, place = np.unique(np.concatenate([pairs[0], new_P]), return_inverse=True)
    both_P = np.concatenate([pairs[1], new_count_P])
    count_P = np.bincount(place, weights=both_P, minlength=len(pair_P)).astype(np.int64)
    return pair_P, count_P


def spread_counts(
    index: Mapping[str, np.ndarray], counts: Integers, pairs: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Return how often each row of a spread table is used in a text, int64 `[V + P]`."""
    heavy_V = index["heavy"]
    token_P, previous_P = pairs[0] // len(heavy_V), pairs[0] % len(heavy_V)
    row_P = _rows_of_pairs(index, token_P, previous_P)
    count_R = np.bincount(row_P, weights=pairs[1], minlength=len(heavy_V) + len(index["pair"])).astype(np.int64)
    count_R[: len(heavy_V)] += np.where(heavy_V, 0, np.asarray(counts, dtype=np.int64))
    return count_R


def _rows_of_pairs(index: Mapping[str, np.ndarray], token_P: np.ndarray, previous_P: np.ndarray) -> np.ndarray:
    import torch

    from fairseq_hash.hashing.lookup import spread_rows, tensors  # the functions by which the model looks rows up

    return spread_rows(tensors(index), torch.from_numpy(token_P), torch.from_numpy(previous_P)).numpy()


def spread_table(
    base: HashTable, counts: Integers, pairs: tuple[np.ndarray, np.ndarray], most_pairs: "int | None" = None
) -> HashTable:
    """Make a table in which heavy tokens have rows for their pairs, and all other tokens keep their rows of `base`.

    The loads start with the tokens that the experts serve without the pairs. Then the pairs, by descending count, go
    each to the K experts with the smallest loads so far. Only the `most_pairs` most frequent pairs are kept. The others
    use the row of the token before them, which the starting loads include.

    The record says how even the loads are on these counts (`largest_over_mean`), and how even they could be with these
    pairs on top of the starting loads (`bound_over_mean`, from `balance.filling_bound`). If one pair exceeds the mean
    load, or if three pairs of more than half of it meet two empty experts, this table is not balanced either.

    `base` is a table over tokens, `[V, K]`, best balanced on the same counts. `most_pairs` is the largest P; None means
    V, so that a table at most doubles. Pairs with the same count are kept or left out together.

    Raises `UserError` if the base is another kind of table, or if counts and pairs come from different texts.
    """
    vocabulary, num_experts, columns = len(base.expert_HK), base.record.num_experts, base.expert_HK.shape[1]
    if base.record.feature != "token" or base.record.is_multi_hash or base.index:
        raise UserError("a spread table starts from a table of token ids to distinct experts; give such a table")
    if len(counts) != vocabulary:
        raise UserError(f"{len(counts)} counts for a hash table of {vocabulary} rows; give one for each row")
    heavy_V = heavy_tokens(counts, num_experts, columns)
    check_pairs(counts, heavy_V, pairs)
    kept_P = _most_frequent(pairs[1], vocabulary if most_pairs is None else most_pairs)
    index = {"heavy": heavy_V, "pair": pairs[0][kept_P]}
    count_R = spread_counts(index, counts, pairs)
    load_E = expert_loads(base.expert_HK, count_R[:vocabulary], num_experts)
    expert_PK = greedy_experts(count_R[vocabulary:], count_R[vocabulary:], load_E, columns)
    expert_RK = np.concatenate([base.expert_HK, expert_PK])
    balance = judge(expert_RK, count_R, num_experts)
    bound = filling_bound(count_R[vocabulary:], load_E, columns)
    settings = {
        "base": base.record.builder,
        "heavy_tokens": int(heavy_V.sum()),
        "pairs": int(kept_P.sum()),
        "pairs_left_out": int((~kept_P).sum()),
        "largest_over_mean": balance.largest_over_mean,
        "bound_over_mean": bound / balance.mean,
    }
    record = replace(base.record, builder="spread", counts_fingerprint=counts_fingerprint(counts), settings=settings)
    return replace(base, expert_HK=expert_RK, record=record, index=index)


def check_pairs(counts: Integers, heavy_V: np.ndarray, pairs: tuple[np.ndarray, np.ndarray]) -> None:
    """Raise `UserError` unless each heavy token has as many pairs as occurrences, and no other token has pairs."""
    token_P = pairs[0] // len(heavy_V)
    paired_V = np.bincount(token_P, weights=pairs[1], minlength=len(heavy_V)).astype(np.int64)
    expected_V = np.where(heavy_V, np.asarray(counts, dtype=np.int64), 0)
    if len(paired_V) != len(expected_V) or (paired_V != expected_V).any():
        token = int((paired_V[: len(expected_V)] != expected_V).argmax())
        raise UserError(
            f"token {token} has {paired_V[token]} pairs, but {expected_V[token]} are expected; "
            "count tokens and pairs in the same text, and pairs of its heavy tokens only"
        )


def _most_frequent(count_P: np.ndarray, most: int) -> np.ndarray:
    """Return which pairs are kept, bool `[P]`: those more frequent than the first pair beyond the `most` best."""
    if len(count_P) <= most:
        return np.ones(len(count_P), dtype=bool)
    return count_P > np.sort(count_P)[::-1][most]
