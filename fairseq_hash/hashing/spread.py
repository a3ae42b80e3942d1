"""Spread tables (ours): the few tokens that overload an expert have the token before them as a second key.

Where a token's share of the text exceeds K / E, no table over single tokens can balance (`balance.lower_bound`). Here
the rows of such a token are those of its pairs with the token before it; all other tokens keep their one row.

Rows 0 to V - 1 are the tokens', row V + i is that of the i-th pair. A pair that the building text does not have uses
the row of the token before it, which is spread over the experts, too.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def spread_rows(index: Mapping[str, Tensor], token_BL: Tensor, previous_BL: Tensor) -> Tensor:
    """Return the row of each token (int64 `[B, L]`).

    Args:
        index: `heavy`, bool `[V]`: which tokens have pairs; `pair`, int64 `[P]`, ascending: token x V + previous token.
        token_BL: int64 token ids.
        previous_BL: the tokens before them.
    """
    heavy_V, pair_P = index["heavy"], index["pair"]
    row_BL = torch.where(heavy_V[token_BL], previous_BL, token_BL)
    if not len(pair_P):
        return row_BL
    pair_BL = token_BL * len(heavy_V) + previous_BL
    place_BL = torch.searchsorted(pair_P, pair_BL).clamp(max=len(pair_P) - 1)
    return torch.where(pair_P[place_BL] == pair_BL, len(heavy_V) + place_BL, row_BL)
