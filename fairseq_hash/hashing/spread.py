"""Spread tables (ours): the few tokens that overload an expert have the token before them as a second key.

Where a token's share of the text exceeds K / E, no table over single tokens can balance (`balance.lower_bound`). Here
the rows of such a token are those of its pairs with the token before it; all other tokens keep their one row.

Rows 0 to V - 1 are the tokens', row V + i is that of the i-th pair. A pair that the building text does not have uses
the row of the token before it, which is spread over the experts, too.

`index` of such a table: `heavy`, bool `[V]`: which tokens have pairs; `pair`, int64 `[P]`, ascending: token x V +
previous token.

Shape suffixes: see `losses`; P is the number of pairs, S that of a text's tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing.balance import expert_loads, filling_bound, judge
from fairseq_hash.hashing.builders import check_counts, greedy_experts
from fairseq_hash.hashing.table import HashTable, counts_fingerprint

BLOCK = 2**24  # tokens at a time, which bounds memory
NO_PAIRS = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)


def heavy_tokens(counts: Sequence[int], num_experts: int, columns: int = 1) -> np.ndarray:
    """Return which tokens overload an expert in any table (bool `[V]`): their count exceeds the mean load K N / E.

    Raises:
        UserError: where the counts carry no information.
    """
    count_V = check_counts(counts)
    return count_V > columns * int(count_V.sum()) / num_experts


def count_pairs(token_S: Sequence[int], heavy_V: np.ndarray, padding: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Count the pairs of a heavy token and the token before it.

    Args:
        token_S: int64 token ids of the text in its order, `[S]`.
        heavy_V: bool `[V]`, from `heavy_tokens`.
        padding: stands before the first token.

    Returns:
        The pairs, token x V + previous token, ascending, and how often each occurs; both int64 `[P]`.
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
    """Return counted pairs with those of some more text: of its heavy tokens, each with the token before it."""
    places = np.flatnonzero(heavy_V[token_S])
    new_P, new_count_P = np.unique(token_S[places] * len(heavy_V) + previous_S[places], return_counts=True)
    pair_P, place = np.unique(np.concatenate([pairs[0], new_P]), return_inverse=True)
    both_P = np.concatenate([pairs[1], new_count_P])
    count_P = np.bincount(place, weights=both_P, minlength=len(pair_P)).astype(np.int64)
    return pair_P, count_P


def spread_counts(
    index: Mapping[str, np.ndarray], counts: Sequence[int], pairs: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Return how often each row of a spread table is used in a text, int64 `[V + P]`.

    Args:
        index: of the table.
        counts: how often each token occurs in the text, `[V]`.
        pairs: what `count_pairs` returns for the text.
    """
    heavy_V = index["heavy"]
    token_P, previous_P = pairs[0] // len(heavy_V), pairs[0] % len(heavy_V)
    row_P = _rows_of_pairs(index, token_P, previous_P)
    count_R = np.bincount(row_P, weights=pairs[1], minlength=len(heavy_V) + len(index["pair"])).astype(np.int64)
    count_R[: len(heavy_V)] += np.where(heavy_V, 0, np.asarray(counts, dtype=np.int64))
    return count_R


def _rows_of_pairs(index: Mapping[str, np.ndarray], token_P: np.ndarray, previous_P: np.ndarray) -> np.ndarray:
    import torch

    from fairseq_hash.hashing.lookup import spread_rows  # the one that the model looks rows up by

    tensors = {name: torch.from_numpy(array) for name, array in index.items()}
    return spread_rows(tensors, torch.from_numpy(token_P), torch.from_numpy(previous_P)).numpy()


def spread_table(
    base: HashTable, counts: Sequence[int], pairs: tuple[np.ndarray, np.ndarray], most_pairs: "int | None" = None
) -> HashTable:
    """Give the heavy tokens (`heavy_tokens`) of a text their pairs as rows; all other tokens keep their rows of `base`.

    The loads begin with what the experts serve without the pairs; the pairs, by descending count, then go each to the K
    experts with the smallest loads so far. Of more than `most_pairs` the most frequent are kept; the others use the row
    of the token before them, which is part of the loads to begin with.

    The record says how even the loads are on these counts (`largest_over_mean`), and how even they could be with these
    pairs on top of these loads (`bound_over_mean`, from `balance.filling_bound`). Where one pair exceeds the mean load,
    or three pairs of more than half of it meet two empty experts, this table is not balanced either.

    Args:
        base: a table over tokens, `[V, K]`, best balanced on the same counts.
        counts: how often each token occurs in the text, `[V]`.
        pairs: what `count_pairs` returns for the text.
        most_pairs: the largest P; None is V, so that a table at most doubles. Pairs of one count stay together.

    Raises:
        UserError: where the base is another kind of table, or counts and pairs are not those of one text.
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


def check_pairs(counts: Sequence[int], heavy_V: np.ndarray, pairs: tuple[np.ndarray, np.ndarray]) -> None:
    """Raise `UserError` unless the pairs are those of the heavy tokens, as often as these occur."""
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
    """Return which pairs are kept, bool `[P]`: those with more occurrences than the first one beyond `most` has."""
    if len(count_P) <= most:
        return np.ones(len(count_P), dtype=bool)
    return count_P > np.sort(count_P)[::-1][most]
