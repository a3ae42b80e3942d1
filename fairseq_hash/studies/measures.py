"""Scores of tokens broken down: by document, by position in the sample, by frequency, and per byte of the text.

Sums and numbers of tokens are given apart, so that those of several texts can be added; sum / tokens is a mean.

Shape suffixes: S tokens of a stream, D documents, L positions of a sample, V symbols of the dictionary, B bins.
"""

import re
from collections.abc import Sequence

import numpy as np

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing.dictionary import END, SPECIAL, UNKNOWN

FEWEST_DOCUMENTS = 20  # a text with fewer is cut into passages
PASSAGE = 1024  # tokens
SPACE = "▁"  # what SentencePiece writes for a space
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
PADDING_WORD = re.compile(r"madeupword\d{4}")  # pads fairseq's dictionary


def documents(id_S: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the document of each token, and what was taken for documents.

    Documents end at empty lines, which are an `</s>` after an `</s>` or at the very beginning; an empty line belongs to
    the document before it, at the beginning to the first one. A text of fewer than 20 documents is cut into stretches
    of 1,024 tokens instead.

    Returns:
        int64 `[S]`, from 0 up; "documents" or "passages of 1,024 tokens".
    """
    is_end_S = np.asarray(id_S) == END
    is_empty_S = is_end_S & np.append(True, is_end_S[:-1])
    begins_S = np.append(True, is_empty_S[:-1]) & ~is_empty_S
    document_S = np.maximum(np.cumsum(begins_S, dtype=np.int64) - 1, 0)
    if begins_S.sum() >= FEWEST_DOCUMENTS:
        return document_S, "documents"
    return np.arange(len(id_S), dtype=np.int64) // PASSAGE, f"passages of {PASSAGE:,} tokens"


def by_document(nats_S: np.ndarray, document_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of nats, float64 `[D]`, and the number of tokens, int64 `[D]`, of each document.

    `document_S` are integers from 0 up. Raises `UserError` if the lengths of the arrays differ.
    """
    return _sums(nats_S, document_S, int(document_S.max()) + 1)


def by_position(nats_S: np.ndarray, tokens_per_sample: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of nats, float64 `[L]`, and the number of tokens, int64 `[L]`, at each position of a sample.

    The samples are those of --sample-break-mode none: all have `tokens_per_sample` tokens to predict, but the last one
    may have fewer. The token at position 0 is predicted from one token: the one before it, which the sample is given
    as its first input, or `</s>` at the beginning of the text.
    """
    return _sums(nats_S, np.arange(len(nats_S)) % tokens_per_sample, tokens_per_sample)


def frequency_edges(count_V: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return the smallest count of each bin of frequencies, int64 `[B]`, and the bins' names: "0", "1-9", "10-99", ...

    The last bin has the largest of the counts, which are integers `[V]`.
    """
    edges = [0, 1]
    while edges[-1] * 10 <= count_V.max():
        edges.append(edges[-1] * 10)
    return np.array(edges, dtype=np.int64), ["0", *(f"{edge:,}-{edge * 10 - 1:,}" for edge in edges[1:])]


def by_frequency(
    nats_S: np.ndarray, id_S: np.ndarray, count_V: np.ndarray, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of nats, float64 `[B]`, and the number of tokens, int64 `[B]`, in each bin of frequencies.

    Args:
        nats_S: floats.
        id_S: the tokens, integers.
        count_V: how often each symbol occurs in the training text. dict.txt does not count `</s>` and `<unk>`.
        edges: the smallest count of each bin, ascending from 0, as of `frequency_edges`.

    Raises:
        UserError: if the lengths of `nats_S` and `id_S` differ.
    """
    bin_V = np.searchsorted(edges, count_V, side="right") - 1
    return _sums(nats_S, bin_V[id_S], len(edges))


def _sums(nats_S: np.ndarray, group_S: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    if len(nats_S) != len(group_S):
        raise UserError(f"{len(nats_S):,} scores for {len(group_S):,} tokens; give the scores of the same text")
    return np.bincount(group_S, nats_S, groups), np.bincount(group_S, minlength=groups)


def are_pieces(symbols: Sequence[str]) -> bool:
    """Return whether the symbols are SentencePiece pieces: more than one of a hundred begins with its space."""
    return sum(symbol.startswith(SPACE) for symbol in symbols) * 100 > len(symbols)


def bytes_of_symbols(symbols: Sequence[str]) -> np.ndarray:
    """Return how many bytes of UTF-8 text each symbol of a dictionary stands for, int64 `[V]`.

    A piece of SentencePiece has the bytes of its characters, its space counted as one; a byte piece (`<0x0A>`) is one.
    A word has its bytes and one for the space before it. `</s>` is one, the end of a line. `<s>`, `<pad>`, the words
    that pad the dictionary and `<unk>`, whose text is not known, have 0: `bytes_of_stream` counts the latter.
    """
    pieces = are_pieces(symbols)
    return np.array([_bytes(symbol, number, pieces) for number, symbol in enumerate(symbols)], dtype=np.int64)


def _bytes(symbol: str, number: int, pieces: bool) -> int:
    if number < len(SPECIAL):
        return int(number == END)
    if PADDING_WORD.fullmatch(symbol):
        return 0
    if not pieces:
        return len(symbol.encode()) + 1
    return 1 if BYTE_PIECE.fullmatch(symbol) else len(symbol.replace(SPACE, " ").encode())


def bytes_of_stream(id_S: np.ndarray, symbols: Sequence[str]) -> tuple[int, int]:
    """Return how many bytes of UTF-8 text a stream of whole lines stands for, and how many of its tokens are `<unk>`.

    The first word of a line has no space before it in the text, but SentencePiece puts one there, and every word is
    counted with one; so each line that begins with a space has one byte less than its symbols. The text of an `<unk>`
    is not known and not counted, nor is the space before it: where there are any, the bytes are too few.

    Bits per byte are the sum of nats / ln 2 / bytes. The bytes are those of the text as SentencePiece normalised it.
    """
    size_V = bytes_of_symbols(symbols)
    has_space_V = size_V > 0
    has_space_V[END] = False
    if are_pieces(symbols):
        has_space_V &= np.array([symbol.startswith(SPACE) for symbol in symbols])
    id_S = np.asarray(id_S)
    begins_S = np.append(True, id_S[:-1] == END)
    size = int(size_V[id_S].sum()) - int(has_space_V[id_S[begins_S]].sum())
    return size, int((id_S == UNKNOWN).sum())
