"""Words of a larger dictionary as keys: a piece has the row of the word that it completes.

Hash Layers (Roller et al. 2021), section 4: hashing with a larger dictionary than the model's own. A language model
must not see how a word continues. So the key of a piece is the word as far as it is written, this piece included, if
the larger dictionary has that word; otherwise it is the piece itself.

Rows 0 to V - 1 belong to the pieces, row V + i to the i-th word, in the order of the hashes. Words are compared by
polynomial hashes, modulo 2^64, of their UTF-8 bytes, because these hashes can be computed from those of the pieces.
`word_index` refuses a dictionary in which two words have the same hash.
"""

from collections.abc import Sequence

import numpy as np

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing.dictionary import SPECIAL

BASE = 0x5851F42D4C957F2D  # odd, so that no power of it loses bits
MOST_PIECES = 16  # after that many pieces of a word, each further piece has its own row
BEGIN, JOIN = "\u2581", "@@"  # SentencePiece marks the beginning of a word, subword-nmt a piece that continues


def word_index(symbols: Sequence[str], words: Sequence[str]) -> dict[str, np.ndarray]:
    """Return what `lookup.word_rows` needs from the model's dictionary and the larger one.

    Args:
        symbols: the model's dictionary: SentencePiece pieces, or pieces of subword-nmt.
        words: the symbols of the larger dictionary. If some have SentencePiece's mark, those without it do not count as
            words.

    Returns:
        `piece_hash`, `piece_power` (int64 `[V]`): a piece's hash, and the factor by which a hash is multiplied when the
        piece is appended; `begins`, `ends` (bool `[V]`): whether a word begins with a piece, or ends with it at the
        latest; `word_hash` (int64 `[words]`), ascending.

    Raises:
        UserError: if the model's dictionary marks no words, or the larger one has none, or has two with the same hash.
    """
    joined = any(symbol.endswith(JOIN) for symbol in symbols)
    if not joined and not any(symbol.startswith(BEGIN) for symbol in symbols):
        raise UserError(
            f"the dictionary marks no words (neither {BEGIN} before one nor {JOIN} within one); "
            "--hash-feature word needs pieces of SentencePiece or subword-nmt"
        )
    begins = [symbol.startswith(BEGIN) or symbol in SPECIAL for symbol in symbols]
    ends = [symbol in SPECIAL or (joined and not symbol.endswith(JOIN)) for symbol in symbols]
    texts = [symbol.removesuffix(JOIN) if joined else symbol.removeprefix(BEGIN) for symbol in symbols]
    hashes = [polynomial_hash(text) for text in texts]
    marked = any(word.startswith(BEGIN) for word in words)
    known = {
        word.removeprefix(BEGIN)
        for word in words
        if word not in SPECIAL and not word.startswith("madeupword") and (not marked or word.startswith(BEGIN))
    } - {""}
    if not known:
        raise UserError("the larger dictionary has no words; give a dict.txt of words, or of pieces with their marks")
    word_hashes = {polynomial_hash(word)[0] for word in known}
    if len(word_hashes) < len(known):
        raise UserError("two words of the larger dictionary have the same hash; leave one of them out")
    piece_hash, piece_power = (np.array([pair[i] for pair in hashes], dtype=np.int64) for i in (0, 1))
    return {
        "piece_hash": piece_hash,
        "piece_power": piece_power,
        "begins": np.array(begins, dtype=bool),
        "ends": np.array(ends, dtype=bool),
        "word_hash": np.array(sorted(word_hashes), dtype=np.int64),
    }


def polynomial_hash(text: str) -> tuple[int, int]:
    """Return hash and power of a text as signed 64-bit numbers: hash(ab) = hash(a) x power(b) + hash(b)."""
    value, power = 0, 1
    for byte in text.encode("utf-8", "surrogatepass"):
        value, power = (value * BASE + byte + 1) % 2**64, power * BASE % 2**64
    signed = np.array([value, power], dtype=np.uint64).astype(np.int64)
    return int(signed[0]), int(signed[1])
