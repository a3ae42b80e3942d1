"""Hash tables: which experts serve which token. This package imports neither fairseq nor torch.

A table is an int64 array `[H, K]` of expert ids. A feature of the token says which row is looked up (`lookup`, in
torch).
"""

from fairseq_hash.hashing.build import TableShape, build_table
from fairseq_hash.hashing.features import Feature
from fairseq_hash.hashing.files import load_table, save_table
from fairseq_hash.hashing.table import HashTable, TableRecord, dictionary_fingerprint

__all__ = [
    "Feature",
    "HashTable",
    "TableRecord",
    "TableShape",
    "build_table",
    "dictionary_fingerprint",
    "load_table",
    "save_table",
]
