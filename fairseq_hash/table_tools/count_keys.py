"""Counts of keys in a text: how often each row of a table is looked up. Shape suffixes: see `moe.losses`."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from fairseq_hash.hashing import Feature
from fairseq_hash.hashing.dictionary import PADDING
from fairseq_hash.hashing.features import MOST_TOKENS
from fairseq_hash.hashing.spread import NO_PAIRS, add_pairs
from fairseq_hash.table_tools.token_streams import Text


def count_keys(
    feature: Feature, num_keys: int, index: Mapping[str, np.ndarray], text: Text, tokens_per_sample: int = 0
) -> np.ndarray:
    """Return how often each of H keys occurs in a text, int64 `[H]`, with a bar on a terminal.

    `index` are the table's further arrays for finding rows. `tokens_per_sample`: cut the text into samples of that many
    tokens, which do not see what is before them; 0: do not cut. Raises `UserError` if the text is damaged, empty, or of
    another dictionary.
    """
    import torch

    from fairseq_hash.hashing.lookup import lookup_rows, tensors

    index_tensors = tensors(index)
    count_H = np.zeros(num_keys, dtype=np.int64)
    with reading(text) as blocks:
        for token_BL, kept in samples(blocks, tokens_per_sample):
            row_BL = lookup_rows(feature, torch.from_numpy(token_BL), PADDING, num_keys, index_tensors)
            count_H += np.bincount(row_BL[:, kept].reshape(-1).numpy(), minlength=num_keys)
    return count_H


def samples(blocks: Iterable[np.ndarray], tokens_per_sample: int) -> Iterator[tuple[np.ndarray, slice]]:
    """Yield int64 `[B, L]` pieces of a text, and which of their L positions to count.

    Samples are cut as fairseq cuts them with --sample-break-mode none. Without samples, a piece also has as many tokens
    before and after it as a feature looks at, so that its keys are those in the whole text.
    """
    rest_S, first = np.empty(0, dtype=np.int64), 0  # the tokens from `first` on are not counted yet
    for block_S in blocks:
        rest_S = np.concatenate([rest_S, block_S])
        if tokens_per_sample:
            end = len(rest_S) // tokens_per_sample * tokens_per_sample
            if end:
                yield rest_S[:end].reshape(-1, tokens_per_sample), slice(None)
            rest_S = rest_S[end:]
        elif len(rest_S) > first + 1:
            end = len(rest_S) - 1
            yield rest_S[None], slice(first, end)
            rest_S = rest_S[max(end - MOST_TOKENS, 0) :]
            first = len(rest_S) - 1
    if len(rest_S) > first:
        yield rest_S[None], slice(first, None)


@contextmanager
def reading(text: Text) -> Iterator[Iterator[np.ndarray]]:
    """Yield the blocks of a text, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        task = bars.add_task(f"reading {text.path.name}", total=text.bytes)
        yield text.blocks(lambda size: bars.advance(task, size))


def count_pairs(text: Text, heavy_V: np.ndarray, tokens_per_sample: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Count the pairs of a heavy token and the token before it, like `hashing.spread.count_pairs`, but block by block.

    Returns the pairs, token x V + previous token, ascending, and how often each occurs; both int64 `[P]`.
    """
    import torch

    from fairseq_hash.hashing.lookup import shifted

    pairs = NO_PAIRS
    with reading(text) as blocks:
        for token_BL, kept in samples(blocks, tokens_per_sample):
            previous_BL = shifted(torch.from_numpy(token_BL), 1, PADDING).numpy()
            pairs = add_pairs(pairs, token_BL[:, kept].reshape(-1), previous_BL[:, kept].reshape(-1), heavy_V)
    return pairs
