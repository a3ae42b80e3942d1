"""Hash tables: which experts serve which token. This package imports neither fairseq nor torch.

A table is an int64 array `[H, K]` of expert ids. A feature of the token says which row is looked up (`lookup`, in
torch).
"""

from fairseq_hash.hashing.balance import Balance, judge, lower_bound
from fairseq_hash.hashing.build import TableShape, build_table, check_shape, placeholder_table
from fairseq_hash.hashing.builders import (
    balanced_experts,
    best_of,
    modulo_experts,
    random_experts,
    round_robin_experts,
    scattered_experts,
)
from fairseq_hash.hashing.clusters import check_embedding, cluster_keys, clustered_experts, dispersed_experts
from fairseq_hash.hashing.features import FEATURES, Feature
from fairseq_hash.hashing.files import load_table, save_table
from fairseq_hash.hashing.registry import BUILDERS
from fairseq_hash.hashing.spread import count_pairs, heavy_tokens, spread_counts, spread_table
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
    "Balance",
    "Feature",
    "HashTable",
    "TableRecord",
    "TableShape",
    "balanced_experts",
    "best_of",
    "build_table",
    "check_embedding",
    "check_shape",
    "check_table",
    "cluster_keys",
    "clustered_experts",
    "count_pairs",
    "counts_fingerprint",
    "dictionary_fingerprint",
    "dispersed_experts",
    "fingerprint_of_tables",
    "heavy_tokens",
    "judge",
    "load_table",
    "lower_bound",
    "modulo_experts",
    "placeholder_table",
    "random_experts",
    "round_robin_experts",
    "scattered_experts",
    "save_table",
    "spread_counts",
    "spread_table",
    "table_fingerprint",
]
