"""The hash tables of a model: buffers, saved with it, and checked when a checkpoint is loaded."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_hash.checkpoint.hash_tables import as_array
from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing import HashTable, TableShape, build_table
from fairseq_hash.hashing.balance import complaint, judge
from fairseq_hash.hashing.build import placeholder_table
from fairseq_hash.hashing.features import OF_TOKENS
from fairseq_hash.hashing.lookup import lookup_rows
from fairseq_hash.hashing.table import check_table, fingerprint_of_tables, table_fingerprint
from fairseq_hash.options.hash_options import HashOptions

logger = logging.getLogger("fairseq_hash.model")

NO_INDEX = ("dictionary_fingerprint", "expert")  # buffers of a table that are not of its index


class TableBuffers(nn.Module):
    """One table: `forward` looks the experts of tokens up."""

    def __init__(self, table: HashTable, is_evaluation: bool = False) -> None:
        """Take a table; in evaluation one to be replaced, by whatever table a checkpoint has."""
        super().__init__()
        self.is_evaluation = is_evaluation
        self.num_experts = table.record.num_experts
        self.is_multi_hash = table.record.is_multi_hash
        self.feature = table.feature
        self.register_buffer("expert", torch.tensor(table.expert_HK, device="cpu"))
        self.register_buffer("dictionary_fingerprint", _bytes(table.record.dictionary_fingerprint))
        for name, array in table.index.items():
            self.register_buffer(name, torch.tensor(array, device="cpu"))

    @property
    def index(self) -> dict[str, Tensor]:
        """What the feature needs to find rows, besides the tokens."""
        return {name: buffer for name, buffer in self.named_buffers() if name not in NO_INDEX}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of feature, entries and index."""
        return self._fingerprint_of(dict(self.named_buffers()))

    def _fingerprint_of(self, buffers: Mapping[str, Tensor]) -> str:
        index = {name: as_array(buffer) for name, buffer in buffers.items() if name not in NO_INDEX}
        return table_fingerprint(as_array(buffers["expert"]), index, self.feature)

    def rows(self, token_BL: Tensor, padding: int, predicted_BL: "Tensor | None") -> Tensor:
        """Return the row of each token, `[B, L]`."""
        return lookup_rows(self.feature, token_BL, padding, len(self.expert), self.index, predicted_BL)

    def forward(self, row_T: Tensor) -> Tensor:
        """Return the experts `[T, K]` in rows of the table."""
        return self.expert.index_select(0, row_T)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        fingerprint = state_dict.get(prefix + "dictionary_fingerprint")
        if fingerprint is not None and not torch.equal(fingerprint.cpu(), self.dictionary_fingerprint.cpu()):
            raise UserError(
                f"its hash table belongs to dictionary {_hex(fingerprint)}, this data has dictionary "
                f"{_hex(self.dictionary_fingerprint)}; prepare the data with the checkpoint's dict.txt "
                "(fairseq-preprocess --srcdict)"
            )
        saved = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if "expert" in saved:
            check_table(as_array(saved["expert"]), self.num_experts, self.is_multi_hash)
            if self.is_evaluation:
                # Built without knowing how many rows there are, and whether tokens are spread.
                for name, value in saved.items():
                    self.register_buffer(name, torch.empty_like(value, device=self.expert.device))
            elif (own := self.fingerprint) != (other := self._fingerprint_of(saved)):
                raise UserError(
                    f"it has hash table {other[:12]}, this model has {own[:12]}; write the checkpoint's by "
                    "fairseq-hash checkpoint table, and give that file as --hash-table"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _bytes(fingerprint: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(fingerprint)), dtype=torch.uint8)


def _hex(fingerprint: Tensor) -> str:
    return bytes(fingerprint.tolist()).hex()[:12]


class HashTables(nn.ModuleList):
    """The tables of all hash layers: one that they share, or one for each in the order of the layers."""

    def __init__(self, tables: Iterable[HashTable], is_evaluation: bool = False) -> None:
        super().__init__(TableBuffers(table, is_evaluation) for table in tables)

    def require_predictor(self, fingerprint: str) -> None:
        """Save the fingerprint of the model that predicts keys, and refuse checkpoints of another one."""
        self.register_buffer("predictor_fingerprint", _bytes(fingerprint))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "predictor_fingerprint")
        own = self._buffers.get("predictor_fingerprint")
        if saved is not None and own is not None and not torch.equal(saved.cpu(), own.cpu()):
            raise UserError(
                f"it was trained with --hash-predictor {_hex(saved)}, this one is {_hex(own)}; give the model that it "
                "was trained with (--model-overrides \"{'hash_predictor': 'PATH'}\" in evaluation)"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all tables; of one that is shared, its own."""
        return fingerprint_of_tables([table.fingerprint for table in self])


def build_tables(
    options: HashOptions,
    symbols: list[str],
    counts: list[int],
    shape: TableShape,
    hash_layers: int,
    is_evaluation: bool = False,
) -> HashTables:
    """Return the tables that the options name; in evaluation ones to be replaced, as the checkpoint has its own.

    Raises:
        UserError: as `hash_tables`.
    """
    if is_evaluation:
        names, _ = _names_and_seeds(options, shape, hash_layers)
        return HashTables((placeholder_table(symbols, shape) for _ in names), is_evaluation)
    tables = hash_tables(options, symbols, counts, shape, hash_layers)
    for name, table in dict(tables).items():
        if text := complaint_of(table, counts):
            logger.warning("--hash-table %s: by the dictionary's counts %s", name, text)
    return HashTables(table for _, table in tables)


def hash_tables(
    options: HashOptions, symbols: list[str], counts: list[int], shape: TableShape, hash_layers: int
) -> list[tuple[str, HashTable]]:
    """Return the tables that the options name, one for all hash layers or one for each, and their names.

    Raises:
        UserError: where a table cannot be built or does not fit, or where there are neither one nor as many as layers.
    """
    names, seeds = _names_and_seeds(options, shape, hash_layers)
    return [
        (name, build_table(name, symbols, counts, shape, seed, is_first=number == 0 or not options.hash_per_layer))
        for number, (name, seed) in enumerate(zip(names, seeds, strict=True))
    ]


def _names_and_seeds(options: HashOptions, shape: TableShape, hash_layers: int) -> tuple[list[str], list[int]]:
    names = [name.strip() for name in options.hash_table.split(",")]
    if len(names) not in (1, hash_layers):
        raise UserError(
            f"--hash-table {options.hash_table} names {len(names)} tables for {hash_layers} hash layers; "
            "give one for all, or one for each"
        )
    if not options.hash_per_layer:
        return names, [options.hash_seed] * len(names)
    return names * hash_layers, [options.hash_seed + layer * shape.columns for layer in range(hash_layers)]


def complaint_of(table: HashTable, counts: Sequence[int]) -> "str | None":
    """Return what is wrong with a table's loads by a dictionary's counts; None, too, where it counts other keys."""
    if table.index or table.record.feature not in OF_TOKENS or not any(counts):
        return None
    return complaint(judge(table.expert_HK, counts, table.record.num_experts, table.record.is_multi_hash))
