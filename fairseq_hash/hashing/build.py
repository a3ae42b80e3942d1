"""The table that a model's options name: built from the dictionary, or read from a file."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing.builders import (
    balanced_experts,
    equal_count,
    modulo_experts,
    random_experts,
    round_robin_experts,
    scattered_experts,
)
from fairseq_hash.hashing.features import OF_TOKENS, Feature
from fairseq_hash.hashing.files import load_table
from fairseq_hash.hashing.table import (
    HashTable,
    TableRecord,
    check_rows,
    check_table_size,
    counts_fingerprint,
    dictionary_fingerprint,
)

BUILDERS = ("balanced", "scattered", "random", "modulo", "round-robin")
OF_COUNTS = ("balanced", "scattered")
DRAWN = ("scattered", "random")


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
    kind: str, symbols: Sequence[str], counts: Sequence[int], shape: TableShape, seed: int, is_first: bool = True
) -> HashTable:
    """Build or load the table that `--hash-table` names: one of `BUILDERS`, or else the path of a table file.

    Args:
        kind: builder or path.
        symbols: the dictionary's symbols, V of them.
        counts: how often each occurs in the training text.
        shape: the shape that the table must have.
        seed: random seed. A balanced table has a random part if it is not the first.
        is_first: whether this is the only table of a model, or the first of several that must differ.

    Raises:
        UserError: if the builder cannot build such a table, or the file has a table of another shape.
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
    if shape.is_multi_hash and shape.columns > 1 and kind not in ("balanced", *DRAWN):
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

    def build(columns: int, number: int) -> np.ndarray:
        if kind == "balanced":
            plain = is_first and number == 0
            return balanced_experts(counts, shape.num_experts, columns, None if plain else seed + number)
        if kind == "scattered":
            return scattered_experts(counts, shape.num_experts, columns, seed + number)
        if kind == "random":
            return random_experts(num_keys, shape.num_experts, columns, seed + number)
        build_fixed = modulo_experts if kind == "modulo" else round_robin_experts
        return build_fixed(num_keys, shape.num_experts, columns)

    if shape.is_multi_hash:
        expert_HK = np.concatenate([build(1, number) for number in range(shape.columns)], axis=1)
    else:
        expert_HK = build(shape.columns, 0)
    record = TableRecord(
        kind,
        shape.num_experts,
        dictionary_fingerprint(symbols),
        seed=seed if kind in DRAWN or (kind == "balanced" and (shape.is_multi_hash or not is_first)) else None,
        counts_fingerprint=counts_fingerprint(counts) if kind in OF_COUNTS else None,
        feature=shape.feature.name,
        length=shape.feature.length,
        is_multi_hash=shape.is_multi_hash,
    )
    return HashTable(expert_HK, record)


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
    record = TableRecord("placeholder", shape.num_experts, dictionary_fingerprint(symbols))
    return HashTable(
        expert_HK,
        replace(record, feature=shape.feature.name, length=shape.feature.length, is_multi_hash=shape.is_multi_hash),
    )
