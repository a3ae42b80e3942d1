"""Hash tables and their records. Shape suffixes: see `moe.losses`; H is the number of keys, a table's rows."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.memory import check_fits
from fairseq_hash.hashing.features import OF_TOKENS, Feature
from fairseq_hash.hashing.mixing import Integers

ENTRY = 3 * 8  # bytes per entry while a table is built: the entry, the number it is drawn from, and a copy


@dataclass(frozen=True)
class TableRecord:
    """What a table was built from, ready for JSON. Fingerprints are SHA-256 in hexadecimal digits.

    Attributes:
        builder: name of the builder.
        num_experts: E.
        dictionary_fingerprint: of the dictionary's symbols.
        seed: the builder's seed; None if it draws nothing.
        counts_fingerprint: of the counts of all keys that the builder used; None if it used none.
        feature, length: the `Feature` that finds a token's row.
        is_multi_hash: whether the K columns are K hash functions, one for each segment of the experts' hidden width;
            else they are K distinct experts.
        settings: other inputs and results of the builder, by name.
    """

    builder: str
    num_experts: int
    dictionary_fingerprint: str
    seed: "int | None" = None
    counts_fingerprint: "str | None" = None
    feature: str = "token"
    length: int = 0
    is_multi_hash: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class HashTable:
    """A table, its record, and the arrays that its feature needs to find rows.

    `expert_HK`: int64 `[H, K]`, every entry from 0 to E - 1, distinct in a row unless the columns are those of
    MultiHash. `index`: arrays of `words.word_index` or of a spread table (`spread`), else empty.
    """

    expert_HK: np.ndarray
    record: TableRecord
    index: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_table(self.expert_HK, self.record.num_experts, self.record.is_multi_hash)

    @property
    def feature(self) -> Feature:
        """The feature that finds a token's row."""
        return Feature(self.record.feature, self.record.length)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of feature, entries and index: see `table_fingerprint`."""
        return table_fingerprint(self.expert_HK, self.index, self.feature)


def dictionary_fingerprint(symbols: Sequence[str]) -> str:
    """Return the SHA-256 of a dictionary's symbols in their order.

    Two dictionaries with the same fingerprint share ids.
    """
    digest = hashlib.sha256()
    for symbol in symbols:
        encoded = symbol.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def counts_fingerprint(counts: Integers) -> str:
    """Return the SHA-256 of counts."""
    return hashlib.sha256(np.asarray(counts, dtype="<i8").tobytes()).hexdigest()


def table_fingerprint(
    expert_HK: np.ndarray, index: "Mapping[str, np.ndarray] | None" = None, feature: "Feature | None" = None
) -> str:
    """Return the SHA-256 of a table's entries, of its index, and of its feature if that is not the token."""
    digest = hashlib.sha256(expert_HK.astype("<i8").tobytes())
    if feature not in (None, Feature()):
        digest.update(str(feature).encode())
    for name, array in sorted((index or {}).items()):
        digest.update(name.encode() + array.astype("<i8").tobytes())
    return digest.hexdigest()


def fingerprint_of_tables(fingerprints: Sequence[str]) -> "str | None":
    """Return one fingerprint for the tables of a model. For one table it is the table's own; for none it is None."""
    if len(fingerprints) < 2:
        return fingerprints[0] if fingerprints else None
    return hashlib.sha256("".join(fingerprints).encode()).hexdigest()


def check_table(expert_HK: np.ndarray, num_experts: int, is_multi_hash: bool = False) -> None:
    """Raise `UserError` unless the table is int64 `[H, K]`, every expert from 0 to E - 1, and distinct in each row.

    With `is_multi_hash` the columns are independent hash functions, so that a row may name an expert twice.
    """
    if expert_HK.dtype != np.int64 or expert_HK.ndim != 2 or not expert_HK.size:
        raise UserError(
            f"a hash table of {expert_HK.dtype} with shape {tuple(expert_HK.shape)} is not usable; give an int64 "
            "NumPy array of shape [vocabulary, experts per token]"
        )
    low, high = int(expert_HK.min()), int(expert_HK.max())
    if low < 0 or high >= num_experts:
        wrong = low if low < 0 else high
        raise UserError(
            f"the hash table names expert {wrong}, but there are experts 0 to {num_experts - 1}; "
            "build the table for this --num-experts"
        )
    if expert_HK.shape[1] == 1 or is_multi_hash:
        return
    sorted_HK = np.sort(expert_HK, axis=1)
    twice_H = (sorted_HK[:, 1:] == sorted_HK[:, :-1]).any(axis=1)
    if twice_H.any():
        row = int(twice_H.argmax())
        raise UserError(
            f"the hash table names an expert twice for one token (row {row}: {expert_HK[row].tolist()}); give K "
            "distinct experts per row"
        )


def check_table_size(rows: int, columns: int, num_experts: int) -> None:
    """Raise `UserError` if a table has fewer entries than experts, or does not fit into memory."""
    if num_experts > rows * columns:
        raise UserError(
            f"{num_experts:,} experts are more than the {rows * columns:,} entries of the hash table ({rows:,} rows "
            f"of {columns:,}), so some would never get a token; give {rows * columns:,} experts or fewer"
        )
    check_fits(
        ENTRY * rows * columns,
        f"a hash table of {rows:,} rows of {columns:,} experts",
        "give fewer rows (--hash-buckets; tables build: --keys) or columns (--multi-hash, --experts-per-token)",
    )


def check_rows(table: HashTable, vocabulary: int) -> None:
    """Raise `UserError` if a table of token ids has another number of rows than the dictionary has symbols."""
    rows, wanted = len(table.expert_HK), vocabulary
    if "pair" in table.index:
        wanted += len(table.index["pair"])
    elif "word_hash" in table.index:
        wanted += len(table.index["word_hash"])
    elif table.record.feature not in OF_TOKENS:
        return
    if rows != wanted:
        raise UserError(
            f"the hash table has {rows} rows, the dictionary asks for {wanted}; build it for this dictionary"
        )
