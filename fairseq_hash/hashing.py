"""Hash tables: which expert serves which token id. Imports neither fairseq nor a GPU.

A table is an int64 tensor `[V, K]` of expert ids, K = 1 today. Everything here is a pure function of its arguments,
with the same result on every machine.
"""

import hashlib
import heapq
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fairseq_hash.errors import UserError

FILE_FORMAT = "fairseq_hash table 1"


@dataclass(frozen=True)
class TableRecord:
    """What a table was built from. Fingerprints are SHA-256 in hexadecimal digits."""

    builder: str
    num_experts: int
    dictionary_fingerprint: str
    seed: "int | None" = None
    counts_fingerprint: "str | None" = None


@dataclass(frozen=True)
class HashTable:
    """A table and its record. `expert_VK`: int64 `[V, K]`, every entry from 0 to E - 1."""

    expert_VK: Tensor
    record: TableRecord

    def __post_init__(self) -> None:
        check_table(self.expert_VK, self.record.num_experts)


def dictionary_fingerprint(symbols: Sequence[str]) -> str:
    """Return the SHA-256 of a dictionary's symbols in their order: two dictionaries with one fingerprint share ids."""
    digest = hashlib.sha256()
    for symbol in symbols:
        encoded = symbol.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def counts_fingerprint(counts: Sequence[int]) -> str:
    """Return the SHA-256 of a dictionary's token counts."""
    return hashlib.sha256(np.asarray(counts, dtype="<i8").tobytes()).hexdigest()


def table_fingerprint(expert_VK: Tensor) -> str:
    """Return the SHA-256 of a table's entries."""
    return hashlib.sha256(expert_VK.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def check_table(expert_VK: Tensor, num_experts: int) -> None:
    """Raise `UserError` unless the table is int64 `[V, K]` with every expert from 0 to `num_experts` - 1."""
    if expert_VK.dtype != torch.int64 or expert_VK.dim() != 2 or expert_VK.numel() == 0:
        raise UserError(
            f"a hash table of {expert_VK.dtype} with shape {tuple(expert_VK.shape)} is not usable; "
            "give int64 of shape [vocabulary, experts a token]"
        )
    low, high = int(expert_VK.min()), int(expert_VK.max())
    if low < 0 or high >= num_experts:
        wrong = low if low < 0 else high
        raise UserError(
            f"the hash table names expert {wrong}, but there are experts 0 to {num_experts - 1}; "
            "build the table for this --num-experts"
        )


def random_table(symbols: Sequence[str], num_experts: int, seed: int) -> HashTable:
    """Give every token an expert drawn at random, each with the same chance.

    Hash Layers (Roller et al. 2021), section 3, random hash. The draw is a hash of seed and token id
    (SplitMix64, Steele et al. 2014), so it needs no random generator and does not depend on a library's version.
    """
    key = np.arange(len(symbols), dtype=np.uint64) + (np.uint64(seed % 2**64) << np.uint64(32))
    expert_V = _splitmix64(_splitmix64(key)) % np.uint64(num_experts)
    table_VK = torch.from_numpy(expert_V.astype(np.int64)).unsqueeze(1)
    return HashTable(table_VK, TableRecord("random", num_experts, dictionary_fingerprint(symbols), seed=seed))


def balanced_table(symbols: Sequence[str], counts: Sequence[int], num_experts: int) -> HashTable:
    """Give the tokens, by descending count, each to the expert with the smallest load so far.

    Hash Layers (Roller et al. 2021), section 3, balanced hash. Ties go to the expert with fewer tokens, then
    to the lower expert; tokens of one count keep the dictionary's order.

    Args:
        symbols: the dictionary's symbols, V of them.
        counts: how often each occurs in the training text.
        num_experts: E.

    Raises:
        UserError: where the counts carry no information (none above 1), or are not V non-negative numbers.
    """
    count_V = np.asarray(counts, dtype=np.int64)
    if count_V.shape != (len(symbols),) or (count_V.size and count_V.min() < 0):
        raise UserError(f"{len(count_V)} counts for {len(symbols)} symbols; a count of 0 or more is needed for each")
    if not count_V.size or count_V.max() <= 1:
        raise UserError(
            "the dictionary has no token counts (none is above 1), and --hash-table balanced needs them; "
            "use a dict.txt that fairseq-preprocess made from the training text, or --hash-table random"
        )
    emptiest = [(0, 0, expert) for expert in range(num_experts)]  # (load, tokens, expert): a heap
    expert_V = np.empty(len(symbols), dtype=np.int64)
    for token in np.argsort(-count_V, kind="stable").tolist():
        load, tokens, expert = emptiest[0]
        expert_V[token] = expert
        heapq.heapreplace(emptiest, (load + int(count_V[token]), tokens + 1, expert))
    record = TableRecord(
        "balanced", num_experts, dictionary_fingerprint(symbols), counts_fingerprint=counts_fingerprint(counts)
    )
    return HashTable(torch.from_numpy(expert_V).unsqueeze(1), record)


def build_table(kind: str, symbols: Sequence[str], counts: Sequence[int], num_experts: int, seed: int) -> HashTable:
    """Build or load the table that `--hash-table` names: `balanced`, `random`, or else the path of a table file."""
    if kind == "balanced":
        return balanced_table(symbols, counts, num_experts)
    if kind == "random":
        return random_table(symbols, num_experts, seed)
    table = load_table(kind)
    if table.record.dictionary_fingerprint != dictionary_fingerprint(symbols):
        raise UserError(
            f"--hash-table {kind} was built for another dictionary; "
            "build it from the dict.txt of this data (fairseq-hash tables build)"
        )
    if table.record.num_experts != num_experts:
        raise UserError(
            f"--hash-table {kind} was built for {table.record.num_experts} experts, but --num-experts is "
            f"{num_experts}; make them equal"
        )
    return table


def placeholder_table(symbols: Sequence[str], num_experts: int) -> HashTable:
    """Return a table that sends every token to expert 0, for a model that takes its table from a checkpoint."""
    table_VK = torch.zeros(len(symbols), 1, dtype=torch.int64)
    return HashTable(table_VK, TableRecord("placeholder", num_experts, dictionary_fingerprint(symbols)))


def save_table(table: HashTable, path: "str | os.PathLike[str]") -> None:
    """Write a table to a safetensors file with its record as metadata; the file appears whole or not at all."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    metadata = {"format": FILE_FORMAT, "record": json.dumps(asdict(table.record))}
    try:
        save_file({"expert": table.expert_VK.contiguous()}, partial, metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_table(path: "str | os.PathLike[str]") -> HashTable:
    """Read a table file; raise `UserError` where it is missing, damaged or something else."""
    if not Path(path).is_file():
        raise UserError(f"--hash-table {path} is neither balanced, nor random, nor an existing table file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FILE_FORMAT:
                raise UserError(f"{path} is not a hash table of this package; build one with fairseq-hash tables build")
            return HashTable(file.get_tensor("expert"), TableRecord(**json.loads(metadata["record"])))
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged or no table file ({type(error).__name__}); build it again") from error


def _splitmix64(key: np.ndarray) -> np.ndarray:
    """Mix 64-bit keys (SplitMix64's output function); unsigned arithmetic wraps by definition."""
    with np.errstate(over="ignore"):
        key = key + np.uint64(0x9E3779B97F4A7C15)
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return key ^ (key >> np.uint64(31))
