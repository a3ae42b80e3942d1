"""The rows of tokens in a table, in torch, as a model looks them up in every batch. See `features`.

Shape suffixes: see `moe.losses`; V is the number of the dictionary's symbols, P that of pairs.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_hash.hashing.features import Feature
from fairseq_hash.hashing.mixing import FIRST, GOLDEN, SECOND
from fairseq_hash.hashing.words import MOST_PIECES


def lookup_rows(
    feature: Feature,
    token_BL: Tensor,
    padding: int,
    num_keys: int,
    index: Mapping[str, Tensor],
    predicted_BL: "Tensor | None" = None,
) -> Tensor:
    """Return the row of each token (int64 `[B, L]`); at padding, any row.

    `num_keys` is H. `index` are the table's further arrays for finding rows, as tensors: those of `words` or of
    `spread`, else empty. `predicted_BL` are, for `predicted`, the ids of the predicted next tokens.
    """
    if feature.name == "token":
        return spread_rows(index, token_BL, shifted(token_BL, 1, padding)) if "pair" in index else token_BL
    if feature.name == "previous":
        return shifted(token_BL, 1, padding)
    if feature.name == "future":
        return shifted(token_BL, -1, padding)
    if feature.name == "predicted":
        assert predicted_BL is not None, "the model asks its predictor first"
        return predicted_BL
    if feature.name == "position":
        return (token_BL.ne(padding).cumsum(dim=1) - 1) % num_keys
    if feature.name == "word":
        return word_rows(index, token_BL)
    newest, oldest = {"bigram": (0, 1), "ngram": (0, feature.length - 1), "history": (1, feature.length)}[feature.name]
    return remainder(mixed_tokens(token_BL, newest, oldest, padding), num_keys)


def mixed_tokens(token_BL: Tensor, newest: int, oldest: int, padding: int) -> Tensor:
    """Return SplitMix64 (int64 `[B, L]`) of the tokens from `oldest` to `newest` positions before each, in order."""
    state_BL = torch.zeros_like(token_BL)
    for distance in range(oldest, newest - 1, -1):
        state_BL = mix_tensor(state_BL ^ shifted(token_BL, distance, padding))
    return state_BL


def remainder(key: Tensor, divisor: int) -> Tensor:
    """Map mixed keys to numbers from 0 to `divisor` - 1."""
    return (key & torch.iinfo(torch.int64).max) % divisor


def tensors(index: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return the arrays of a table's index as `rows` takes them, on a CPU."""
    return {name: torch.from_numpy(array) for name, array in index.items()}


def shifted(token_BL: Tensor, distance: int, padding: int) -> Tensor:
    """Return the token `distance` positions before each token (after it, if negative); padding if there is none."""
    if abs(distance) >= token_BL.shape[1]:
        return torch.full_like(token_BL, padding)
    return F.pad(token_BL, (distance, -distance), value=padding)


def spread_rows(index: Mapping[str, Tensor], token_BL: Tensor, previous_BL: Tensor) -> Tensor:
    """Return the row of each token (int64 `[B, L]`).

    `index` has `heavy`, bool `[V]`: which tokens have pairs; `pair`, int64 `[P]`, ascending: token x V + previous
    token.
    """
    heavy_V, pair_P = index["heavy"], index["pair"]
    row_BL = torch.where(heavy_V[token_BL], previous_BL, token_BL)
    if not len(pair_P):
        return row_BL
    pair_BL = token_BL * len(heavy_V) + previous_BL
    place_BL = torch.searchsorted(pair_P, pair_BL).clamp(max=len(pair_P) - 1)
    return torch.where(pair_P[place_BL] == pair_BL, len(heavy_V) + place_BL, row_BL)


def word_rows(index: Mapping[str, Tensor], token_BL: Tensor) -> Tensor:
    """Return the row of each piece (int64 `[B, L]`); `index` is what `word_index` returned."""
    place_L = torch.arange(token_BL.shape[1], device=token_BL.device)
    begins_BL = index["begins"][token_BL]  # padding is a special symbol: it begins and ends a word
    begins_BL[:, 1:] |= index["ends"][token_BL[:, :-1]]
    # No `where` with a number: a GPU would wait for the copy of that number.
    start_BL = (place_L * begins_BL).cummax(dim=1).values
    pieces_BL = place_L - start_BL + 1
    hash_BL, power_BL = index["piece_hash"][token_BL], index["piece_power"][token_BL]
    for distance in range(1, min(MOST_PIECES, token_BL.shape[1])):
        # If the word has more pieces than `distance`, prepend the piece that is so far back.
        older_BL = torch.cat([token_BL[:, :distance], token_BL[:, :-distance]], dim=1)
        joined_BL = index["piece_hash"][older_BL] * power_BL + hash_BL
        within_BL = pieces_BL > distance
        hash_BL = torch.where(within_BL, joined_BL, hash_BL)
        power_BL = torch.where(within_BL, index["piece_power"][older_BL] * power_BL, power_BL)
    word_hash = index["word_hash"]
    place_BL = torch.searchsorted(word_hash, hash_BL).clamp(max=len(word_hash) - 1)
    is_word_BL = (word_hash[place_BL] == hash_BL) & (pieces_BL <= MOST_PIECES)
    return torch.where(is_word_BL, len(index["begins"]) + place_BL, token_BL)


def mix_tensor(key: Tensor) -> Tensor:
    """Mix 64-bit keys in an int64 tensor: the same bits as `mixing.mix`. torch has no unsigned arithmetic."""
    key = key + (GOLDEN - 2**64)
    key = (key ^ _shift(key, 30)) * (FIRST - 2**64)
    key = (key ^ _shift(key, 27)) * (SECOND - 2**64)
    return key ^ _shift(key, 31)


def _shift(key: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch fills with the sign."""
    return (key >> bits) & (2 ** (64 - bits) - 1)
