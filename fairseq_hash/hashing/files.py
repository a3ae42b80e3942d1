"""Table files: safetensors, with the record as metadata."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.fields import wrong_field
from fairseq_hash.core.files import output_file
from fairseq_hash.core.json_text import parse_object
from fairseq_hash.hashing.table import HashTable, TableRecord, check_table_size

FILE_FORMAT = "fairseq_hash table 1"
EXPERT = "expert"  # the table's own array; all others belong to its index


def save_table(table: HashTable, path: "str | os.PathLike[str]") -> None:
    """Write a table to a safetensors file with its record as metadata. The file appears whole or not at all.

    Raises:
        UserError: if the file cannot be written.
    """
    metadata = {"format": FILE_FORMAT, "record": json.dumps(asdict(table.record))}
    arrays = {EXPERT: table.expert_HK, **table.index}
    with output_file(Path(path)) as partial:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial, metadata)


def load_table(path: "str | os.PathLike[str]") -> HashTable:
    """Read a table file; raise `UserError` if it is missing, damaged or something else."""
    if not Path(path).is_file():
        raise UserError(f"--hash-table {path} is neither a builder's name nor an existing table file")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FILE_FORMAT:
                raise UserError(f"{path} is not a hash table of this package; build one with fairseq-hash tables build")
            record = TableRecord(**parse_object(metadata["record"]))
            if (wrong := wrong_field(record)) is not None:
                raise UserError(f"{path} has a damaged record (its {wrong}); build the table again")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            table = HashTable(arrays.pop(EXPERT), record, arrays)
            rows, columns = table.expert_HK.shape
            check_table_size(rows, columns, record.num_experts)
            return table
    except UserError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged or no table file ({type(error).__name__}); build it again") from error
