"""The hash tables in a checkpoint."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.fields import fits, wrong_field
from fairseq_hash.hashing import HashTable, TableRecord

NAME = r"decoder\.hash_tables\.(\d{1,9})\.(\w+)"


def as_array(tensor: Tensor) -> np.ndarray:
    """Return a tensor of a table as an array; one of floating point, which no table has, as float32 to be refused."""
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()


def tables_of(model: Mapping[str, Any], options: Mapping[str, Any], num_experts: int) -> list[HashTable]:
    """Return the tables of a checkpoint's model in the order of its hash layers, none where it has no such layers.

    `model` is the model's state; its options say of what feature the tables are.

    Raises:
        UserError: where a table is damaged.
    """
    tensors: dict[int, dict[str, Any]] = {}
    for name, tensor in model.items():
        if found := re.fullmatch(NAME, name):
            tensors.setdefault(int(found[1]), {})[found[2]] = tensor
    tables = []
    for _, parts in sorted(tensors.items()):
        try:
            expert_HK, digest = parts.pop("expert"), parts.pop("dictionary_fingerprint")
        except KeyError as error:
            raise UserError(f"the checkpoint's hash table lacks {error}; use another checkpoint") from None
        hashes = options.get("multi_hash", 1)
        record = TableRecord(
            "checkpoint",
            num_experts,
            bytes(digest.tolist()).hex() if digest.dtype == torch.uint8 and digest.dim() == 1 else "",
            feature=options.get("hash_feature", "token"),
            length=options.get("hash_length", 0),
            is_multi_hash=hashes > 1 if fits(hashes, int) else hashes,
        )
        wrong = wrong_field(record) or ("" if record.dictionary_fingerprint else "dictionary_fingerprint")
        if wrong:
            raise UserError(f"the checkpoint's hash table is damaged (its {wrong}); use another checkpoint")
        index = {name: as_array(tensor) for name, tensor in parts.items()}
        tables.append(HashTable(as_array(expert_HK), record, index))
    return tables
