"""Tables in the form of other frameworks: one tensor `tid2eid`, int64 `[V, K]`, in the order of their vocabulary.

DeepSeek-V4 gives this name to its table of expert ids by token id; `transformers` and Megatron-LM use it, too.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import output_file
from fairseq_hash.hashing import HashTable, TableRecord, dictionary_fingerprint
from fairseq_hash.hashing.builders import random_experts, round_robin_experts
from fairseq_hash.hashing.dictionary import indices
from fairseq_hash.hashing.table import check_table_size

NAME = "tid2eid"


def check_exportable(table: HashTable, name: object) -> None:
    """Raise `UserError` unless a table maps token ids to experts and has nothing else."""
    record = table.record
    if record.feature != "token":
        raise UserError(f"{name} is a table of {table.feature}; only tables of token ids can be exported")
    if "pair" in table.index:
        raise UserError(f"{name} has pairs of tokens as keys (spread); only tables of single tokens can be exported")
    if record.is_multi_hash:
        raise UserError(f"{name} is a table of MultiHash, whose columns are segments; only whole experts are exported")


def reorder(
    expert_VK: np.ndarray, symbols: Sequence[str], wanted: Sequence[str], num_experts: int, seed: int
) -> tuple[np.ndarray, int]:
    """Return the rows for other symbols, and the number of these symbols that the table lacks.

    `expert_VK` is int64, in the order of `symbols`; the rows are those of `wanted`, in this order. Symbols that the
    table lacks get random experts by the seed. Raises `UserError` if no symbol is in both.
    """
    index = indices(list(symbols))
    row_W = np.array([index.get(symbol, -1) for symbol in wanted])
    missing_W = row_W < 0
    if missing_W.all():
        raise UserError(
            f"the vocabulary and the dictionary have no symbol in common (such as {wanted[0]!r} and {symbols[-1]!r}); "
            "give the vocabulary that the dictionary's pieces come from"
        )
    drawn_WK = random_experts(len(wanted), num_experts, expert_VK.shape[1], seed)
    known_WK = expert_VK[row_W.clip(min=0)]
    return np.where(missing_W[:, None], drawn_WK, known_WK), int(missing_W.sum())


def pad(expert_VK: np.ndarray, multiple: int, num_experts: int) -> np.ndarray:
    """Return a table with rows added up to a multiple, as frameworks pad the vocabulary; round-robin fills them.

    Tokens of padding never occur, but their rows are read as all others are, and need K distinct experts.
    """
    rows, columns = expert_VK.shape
    return np.concatenate([expert_VK, round_robin_experts(-rows % multiple, num_experts, columns)])


def write_tensor(expert_VK: np.ndarray, record: TableRecord, out: Path) -> None:
    """Write the tensor `tid2eid`, in NumPy's format if the name ends in .npy, else as safetensors."""
    with output_file(out) as partial:
        if out.suffix == ".npy":
            with partial.open("wb") as file:  # np.save adds a suffix to a name
                np.save(file, expert_VK)
        else:
            metadata = {"num_experts": str(record.num_experts), "fairseq_hash_record": json.dumps(asdict(record))}
            save_file({NAME: np.ascontiguousarray(expert_VK)}, partial, metadata)


def is_foreign(path: Path) -> bool:
    """Return whether a file is a table of another framework: .npy, or safetensors with a tensor `tid2eid`."""
    if path.suffix == ".npy":
        return True
    try:
        with safe_open(path, framework="np") as file:
            return any(name.endswith(NAME) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def read_tensor(path: Path, name: "str | None") -> tuple[np.ndarray, str]:
    """Read a table of another framework; return int64 `[V, K]` and the tensor's name.

    `path` is a .npy file, or safetensors; `name` is that of the tensor, None for the only one whose name ends in
    `tid2eid`. Raises `UserError` if the file is missing or damaged, or has no such tensor, several, or one of another
    kind.
    """
    tables, _ = read_tensors(path, name)
    if len(tables) > 1:
        raise UserError(
            f"{path} has {len(tables)} tensors ({', '.join(list(tables)[:4])}) whose name ends in {NAME}; name one by "
            "--tensor"
        )
    ((chosen, expert_VK),) = tables.items()
    return expert_VK, chosen


def read_tensors(path: Path, name: "str | None") -> tuple[dict[str, np.ndarray], "int | None"]:
    """Read the tables of a file of another framework, those of several layers, too.

    `path` and `name` are as for `read_tensor`; None stands for all tensors whose name ends in `tid2eid`. Returns int64
    `[V, K]` by the tensors' names, in the order of layers, and the number of experts if the file states it. Raises
    `UserError` as `read_tensor` does.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a file of safetensors, or .npy")
    if path.suffix == ".npy":
        if name is not None:
            raise UserError(f"--tensor {name}: {path} has one tensor without a name; leave --tensor out")
        try:
            # Mapped, as a damaged header may ask for any memory. Its text is parsed by Python's own parser.
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:
            raise UserError(f"{path} is damaged or no .npy file ({type(error).__name__})") from None
        return {path.name: _as_table(array, f"{path}")}, None
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            chosen = [name] if name is not None else [other for other in names if other.endswith(NAME)]
            if not chosen:
                raise UserError(f"{path} has no tensor whose name ends in {NAME}; name one by --tensor")
            if name is not None and name not in names:
                raise UserError(f"{path} has no tensor {name}; it has {', '.join(names[:4]) or 'none'}")
            for one in chosen:
                kind = file.get_slice(one).get_dtype()
                if kind not in ("I32", "I64"):
                    raise UserError(f"{one} of {path} is of type {kind}; a table is of int64 or int32")
            stated = (file.metadata() or {}).get("num_experts", "")
            tables = {one: _as_table(file.get_tensor(one), f"{one} of {path}") for one in sorted(chosen, key=_numbers)}
            return tables, int(stated) if stated.isdecimal() and len(stated) < 19 else None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({type(error).__name__})") from None


def _numbers(name: str) -> list["int | str"]:
    """Return a name with its numbers as numbers, so that layer 10 comes after layer 9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d{1,9})", name)]


def _as_table(array: np.ndarray, what: str) -> np.ndarray:
    if array.dtype not in (np.int32, np.int64):
        raise UserError(f"{what} is of type {array.dtype}; a table is of int64 or int32")
    if array.ndim != 2 or not array.size:
        raise UserError(f"{what} has shape {list(array.shape)}; a table has [vocabulary, experts per token]")
    return array.astype(np.int64)


def import_table(
    expert_WK: np.ndarray,
    name: str,
    symbols: Sequence[str],
    num_experts: int,
    vocabulary: "Sequence[str] | None" = None,
    seed: int = 42,
) -> tuple[HashTable, int]:
    """Turn a table of another framework into ours. Return it, and the number of symbols that it lacked.

    `expert_WK` is int64, `name` its tensor's, for the record; `vocabulary` are the symbols of its rows, None if they
    are those of our dictionary. Symbols that it lacks get random experts by the seed. Raises `UserError` for another
    number of rows, an id out of range, or an expert twice in a row.
    """
    rows, whose = (len(symbols), "dictionary") if vocabulary is None else (len(vocabulary), "vocabulary")
    if len(expert_WK) != rows:
        hint = "" if vocabulary is not None else ", or the table's own --vocabulary"
        hint += "" if len(expert_WK) < rows else "; if the last rows are padding, add --padded"
        raise UserError(
            f"{name} has {len(expert_WK)} rows, but the {whose} has {rows} symbols; give the {whose} of this "
            f"table{hint}"
        )
    check_table_size(len(symbols), expert_WK.shape[1], num_experts)
    record = TableRecord("imported", num_experts, dictionary_fingerprint(symbols), settings={"tensor": name})
    table, missing = HashTable(expert_WK, record), 0  # checked before reordering, so that errors name the file's rows
    if vocabulary is not None:
        expert_VK, missing = reorder(expert_WK, vocabulary, symbols, num_experts, seed)
        table = HashTable(expert_VK, record)
    return table, missing
