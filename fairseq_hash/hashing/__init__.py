"""Hash tables: which experts serve which token. Imports neither fairseq nor a GPU.

A table is an int64 tensor `[H, K]` of expert ids; a feature of the token says which row is looked up.
"""

from fairseq_hash.hashing.build import BUILDERS, TableShape, build_table, check_shape, placeholder_table
from fairseq_hash.hashing.builders import balanced_experts, modulo_experts, random_experts, round_robin_experts
from fairseq_hash.hashing.features import FEATURES, Feature
from fairseq_hash.hashing.files import load_table, save_table
from fairseq_hash.hashing.table import (
    HashTable,
    TableRecord,
    check_table,
    counts_fingerprint,
    dictionary_fingerprint,
    fingerprint_of_tables,
    table_fingerprint,
)

__all__ = [
    "BUILDERS",
    "FEATURES",
    "Feature",
    "HashTable",
    "TableRecord",
    "TableShape",
    "balanced_experts",
    "build_table",
    "check_shape",
    "check_table",
    "counts_fingerprint",
    "dictionary_fingerprint",
    "fingerprint_of_tables",
    "load_table",
    "modulo_experts",
    "placeholder_table",
    "random_experts",
    "round_robin_experts",
    "save_table",
    "table_fingerprint",
]
