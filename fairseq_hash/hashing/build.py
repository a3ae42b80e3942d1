"""The table that a model's options name: built from the dictionary, or read from a file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing.builders import equal_count
from fairseq_hash.hashing.features import OF_TOKENS, Feature
from fairseq_hash.hashing.files import load_table
from fairseq_hash.hashing.mixing import Integers
from fairseq_hash.hashing.registry import BUILDERS, DRAWN, OF_COUNTS, REGISTRY, VARYING, Keys
from fairseq_hash.hashing.table import (
    HashTable,
    TableRecord,
    check_rows,
    check_table_size,
    counts_fingerprint,
    dictionary_fingerprint,
)


@dataclass(frozen=True)
class TableShape:
    """The shape that a model needs its table to have.

    Attributes:
        num_experts: E.
        columns: K experts per token; with `is_multi_hash`, N hash functions.
        is_multi_hash: whether each column picks one segment of the experts' hidden width.
        feature: the feature that finds a token's row.
        num_keys: rows of a table of buckets or positions.
    """

    num_experts: int
    columns: int = 1
    is_multi_hash: bool = False
    feature: Feature = field(default_factory=Feature)
    num_keys: int = 0


def build_table(
    kind: str, symbols: Sequence[str], counts: Integers, shape: TableShape, seed: int, is_first: bool = True
) -> HashTable:
    """Build or load the table that `--hash-table` names: one of `BUILDERS`, or else the path of a table file.

    `counts` say how often each of the V symbols occurs in the training text. A balanced table has a random part, by the
    seed, if it is not the first of several that must differ. Raises `UserError` if the builder cannot build such a
    table, or the file has a table of another shape.
    """
    if kind not in BUILDERS:
        table = load_table(kind)
        check_shape(table, shape, symbols, kind)
        return table
    if shape.feature.name == "word":
        raise UserError(f"--hash-feature word needs a table file, not {kind}; build one with fairseq-hash tables build")
    if len(counts) != len(symbols):
        raise UserError(f"{len(counts)} counts for {len(symbols)} symbols; a count is needed for each")
    of_tokens = shape.feature.name in OF_TOKENS
    if kind in OF_COUNTS and not of_tokens:
        raise UserError(
            f"--hash-table {kind} has no counts for --hash-feature {shape.feature.name}: the dictionary counts "
            "tokens; use random, or build a table from text with fairseq-hash tables build"
        )
    if shape.is_multi_hash and shape.columns > 1 and kind not in VARYING:
        raise UserError(
            f"--multi-hash {shape.columns} needs a builder that can make different tables; use balanced, "
            f"{' or '.join(DRAWN)}, not {kind}"
        )
    num_keys = len(symbols) if of_tokens else shape.num_keys
    check_table_size(num_keys, shape.columns, shape.num_experts)
    if kind in OF_COUNTS and (count := equal_count(counts)):
        raise UserError(
            f"the dictionary counts every symbol {count:,} times, which no text does, and --hash-table {kind} "
            "balances by counts; count the training text (fairseq-hash tables build DATA/dict.txt --text DATA "
            f"--num-experts {shape.num_experts} --out FILE, and --hash-table FILE), or use --hash-table random"
        )

    expert_HK = deal_out(kind, Keys(num_keys, np.asarray(counts)), shape, seed, is_first=is_first)
    builder = REGISTRY[kind]
    uses_seed = builder.is_drawn or (builder.varies and (shape.is_multi_hash or not is_first))
    seen = counts if kind in OF_COUNTS else None
    return HashTable(expert_HK, record_of(kind, symbols, shape, seed if uses_seed else None, seen))


def deal_out(kind: str, keys: Keys, shape: TableShape, seed: int, number: int = 0, is_first: bool = True) -> np.ndarray:
    """Return the experts that a builder gives to keys, int64 `[H, K]`.

    With hash functions each column is built for itself. `number` says which of several tables by this seed; table 0 is
    made without a seed if the builder allows it. `is_first`: as in `build_table`.
    """
    builder = REGISTRY[kind]

    def build(columns: int, number: int) -> np.ndarray:
        is_plain = not builder.is_drawn and is_first and number == 0
        return builder.build(keys, shape.num_experts, columns, None if is_plain else seed + number)

    if not shape.is_multi_hash:
        return build(shape.columns, number)
    first = number * shape.columns
    return np.concatenate([build(1, first + column) for column in range(shape.columns)], axis=1)


def record_of(
    kind: str,
    symbols: Sequence[str],
    shape: TableShape,
    seed: "int | None" = None,
    counts: "Integers | None" = None,
    settings: "dict[str, Any] | None" = None,
) -> TableRecord:
    """Return the record of a table. `seed` and `counts` are None if the table was built without them."""
    return TableRecord(
        kind,
        shape.num_experts,
        dictionary_fingerprint(symbols),
        seed=seed,
        counts_fingerprint=None if counts is None else counts_fingerprint(counts),
        feature=shape.feature.name,
        length=shape.feature.length,
        is_multi_hash=shape.is_multi_hash,
        settings=settings or {},
    )


def check_shape(table: HashTable, shape: TableShape, symbols: Sequence[str], name: str) -> None:
    """Raise `UserError` if a table from a file does not have the shape that the model needs."""
    record = table.record
    if record.dictionary_fingerprint != dictionary_fingerprint(symbols):
        raise UserError(
            f"--hash-table {name} was built for another dictionary; "
            "build it from the dict.txt of this data (fairseq-hash tables build)"
        )
    if record.num_experts != shape.num_experts:
        raise UserError(
            f"--hash-table {name} was built for {record.num_experts} experts, but --num-experts is "
            f"{shape.num_experts}; make them equal"
        )
    if table.feature != shape.feature:
        length = f" --hash-length {record.length}" if record.length else ""
        raise UserError(
            f"--hash-table {name} is a table of {table.feature}, but the model asks for {shape.feature}; give "
            f"--hash-feature {record.feature}{length}, or another table"
        )
    columns = table.expert_HK.shape[1]
    option = "--multi-hash" if record.is_multi_hash else "--experts-per-token"
    if columns != shape.columns or (columns > 1 and record.is_multi_hash != shape.is_multi_hash):
        raise UserError(f"--hash-table {name} is for {option} {columns}; give that, or another table")
    check_rows(table, len(symbols))


def placeholder_table(symbols: Sequence[str], shape: TableShape) -> HashTable:
    """Return a table that sends every token to the first experts, for a model that takes its own from a checkpoint."""
    expert_K = np.zeros(shape.columns, dtype=np.int64) if shape.is_multi_hash else np.arange(shape.columns)
    expert_HK = np.tile(expert_K, (len(symbols), 1))
    return HashTable(expert_HK, record_of("placeholder", symbols, shape))
