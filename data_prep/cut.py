"""A smaller copy of prepared data, for small experiments: passages that lie evenly over the text.

Shape suffixes: N lines of a split; V symbols of the dictionary.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDataset

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import atomic_write, write_json
from fairseq_hash.hashing import dictionary_fingerprint
from fairseq_hash.hashing.dictionary import read_dictionary
from fairseq_hash.provenance import provenance, sha256_of_file
from fairseq_hash.table_tools.token_streams import open_text

from .binarize import binarize, count_symbols
from .corpora import SPLITS
from .options import DICTIONARY, MODEL, PROVENANCE, identity_in
from .prepare import is_done, place_of

PASSAGES = {"train": 64, "valid": 16, "test": 16}  # at most
LEAST = 1024  # tokens of a passage, or the split has fewer passages
BATCH = 1 << 16  # lines that are copied at once


@dataclass(frozen=True)
class Passage:
    """Lines `first` to `end` (not included) of a split; of them all, `tokens` tokens are taken from the beginning."""

    first: int
    end: int
    tokens: int


def cut(data: Path, out: Path, wanted: dict[str, "int | None"]) -> bool:
    """Write a smaller copy of a data folder to `out`. Return False if the same was cut before.

    `wanted` has the number of tokens by split, `</s>` counted; None: the split is copied whole. The symbols of the
    dictionary stay; their counts are those of the new training text. A dictionary that was taken from other data with
    `--like` stays as it is: a balanced hash table is made of its counts, and the copy is for a model that has one.

    Raises:
        UserError: if `data` is no data folder or has fewer tokens, or `out` holds something else.
    """
    place = place_of(out)
    sizes = {split: _check(data, split, wanted[split]) for split in SPLITS}
    names = [DICTIONARY, *(f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx"))]
    names += [MODEL] if (data / MODEL).is_file() else []
    identity: dict[str, Any] = {
        "corpus": "cut",
        "of": {name: sha256_of_file(data / name) for name in names},
        "tokens": wanted,
        # Whether the symbols are words: `--like` asks.
        "words": identity_in(data).get("words"),
    }
    if like := identity_in(data).get("like"):
        identity["like"] = like
    if is_done(out, identity):
        return False
    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(place) as work:
        work.mkdir()
        passages = {split: _write(data / split, work / split, wanted[split]) for split in SPLITS}
        if like:
            shutil.copyfile(data / DICTIONARY, work / DICTIONARY)
            symbols = Dictionary.load(str(data / DICTIONARY)).symbols
        else:
            symbols = _write_dictionary(data / DICTIONARY, work)
        if MODEL in names:
            shutil.copyfile(data / MODEL, work / MODEL)
        record = {
            "identity": identity,
            **provenance(),
            "cut": {
                split: {"tokens": wanted[split] or size, "of_tokens": size, "passages": passages[split]}
                for split, size in sizes.items()
            },
            "symbols": len(symbols),
            "dictionary_fingerprint": dictionary_fingerprint(symbols),
            "sha256": {path.name: sha256_of_file(path) for path in sorted(work.iterdir())},
        }
        write_json(work / PROVENANCE, record)
    return True


def _check(data: Path, split: str, wanted: "int | None") -> int:
    """Return the number of tokens of a split. Raises `UserError` if it is damaged or has fewer than are wanted."""
    if not data.is_dir():
        raise UserError(f"{data} is no folder; give one that data_prep or fairseq-preprocess wrote")
    symbols, _ = read_dictionary(data / DICTIONARY)
    if len(set(symbols)) < len(symbols):
        raise UserError(f"{data / DICTIONARY} has a symbol twice (#fairseq:overwrite); give one line per symbol")
    open_text(data, split, symbols)  # checks its files
    index = MMapIndexedDataset.Index(f"{data / split}.idx")  # its sizes are there as long as it is
    size = int(index.sizes.sum(dtype=np.int64))
    if wanted is not None and not 1 <= wanted <= size:
        raise UserError(
            f"--{split}-tokens {wanted:,} is out of range; {data / split} has {size:,} tokens: give a number from 1 "
            "to that, or leave the option out to take all"
        )
    return size


def passages_of(size_N: np.ndarray, tokens: int, passages: int) -> list[Passage]:
    """Return passages that have `tokens` tokens together, in the order of the text; none overlaps another.

    The text falls into as many stretches of equal length, and a passage begins in each: at the first beginning of a
    document there (the first line after an empty one, which has one token), or else at the first beginning of a line.
    Only the last line of the last passage may be cut.

    `size_N` are the lengths of the lines, integers; `tokens` is at most their sum.
    """
    start_N = np.cumsum(size_N, dtype=np.int64) - size_N
    total = int(start_N[-1] + size_N[-1])
    is_empty_N = size_N == 1
    document_D = np.flatnonzero(np.append(True, is_empty_N[:-1]) & ~is_empty_N)
    found: list[Passage] = []
    line = taken = 0
    for number in range(passages):
        goal = tokens * (number + 1) // passages  # of this passage and those before it
        if taken >= goal:
            continue  # a long line before it was enough
        first, beyond = np.searchsorted(start_N, [total * number // passages, total * (number + 1) // passages])
        # What follows must have room for all that is still to be taken.
        latest = int(np.searchsorted(start_N, total - (tokens - taken), side="right")) - 1
        first = min(max(line, int(first)), latest)
        document = np.searchsorted(document_D, first)
        if document < len(document_D) and document_D[document] <= min(latest, int(beyond) - 1):
            first = int(document_D[document])
        line = int(np.searchsorted(start_N, start_N[first] + goal - taken))
        of_lines = (int(start_N[line]) if line < len(start_N) else total) - int(start_N[first])
        found.append(Passage(first, line, min(of_lines, tokens - taken)))
        taken += found[-1].tokens
    return found


def _write(source: Path, target: Path, wanted: "int | None") -> int:
    """Write a split (paths without suffix), whole or cut to tokens; return the number of its passages."""
    if wanted is None:
        for kind in ("bin", "idx"):
            shutil.copyfile(f"{source}.{kind}", f"{target}.{kind}")
        return 1
    index = MMapIndexedDataset.Index(f"{source}.idx")
    most = min(PASSAGES[source.name], max(1, wanted // LEAST))
    passages = passages_of(index.sizes, wanted, most)
    symbols = len(read_dictionary(source.parent / DICTIONARY)[0])
    binarize(_lines(source, index, passages), symbols, target)
    _, tokens, _ = count_symbols(target, symbols)
    if tokens != wanted:
        raise UserError(f"{target.name} has {tokens:,} tokens, not {wanted:,}; report it")
    return len(passages)


def _lines(
    source: Path, index: "MMapIndexedDataset.Index", passages: list[Passage]
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Yield the lines of the passages, batch by batch: ids, int64 `[tokens]`, and lengths."""
    start_N = np.cumsum(index.sizes, dtype=np.int64) - index.sizes
    text_S = np.memmap(f"{source}.bin", dtype=index.dtype, mode="r")
    for passage in passages:
        left = passage.tokens
        for first in range(passage.first, passage.end, BATCH):
            length_N = index.sizes[first : min(first + BATCH, passage.end)].astype(np.int64)
            tokens = min(left, int(length_N.sum()))
            length_N[-1] -= int(length_N.sum()) - tokens  # the last line of all may be cut
            yield text_S[start_N[first] : start_N[first] + tokens].astype(np.int64), length_N.tolist()
            left -= tokens


def _write_dictionary(source: Path, work: Path) -> list[str]:
    """Write the dictionary with the counts of the new training text; return its symbols."""
    dictionary = Dictionary.load(str(source))
    _, _, count_V = count_symbols(work / "train", len(dictionary))
    dictionary.count[dictionary.nspecial :] = count_V[dictionary.nspecial :].tolist()
    dictionary.save(str(work / DICTIONARY))
    return dictionary.symbols
