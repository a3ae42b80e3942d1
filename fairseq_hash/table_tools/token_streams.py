"""Text as token ids, block by block, from a binarized data set of fairseq or a file of symbols.

Shape suffixes: see `moe.losses`; S is a stretch of tokens.
"""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing import dictionary_fingerprint
from fairseq_hash.hashing.dictionary import END, UNKNOWN, indices, read_dictionary

BLOCK = 1 << 20  # tokens of a binarized text, or characters of a file, in memory at once

# The index file of fairseq/data/indexed_dataset.py: magic, version (8 bytes), dtype code (1), length (8); then the
# number of tokens of every line (int32) and the byte where it starts (int64).
HEADER = struct.Struct("<9sQBQ")
LINE = 4 + 8
MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4"}  # by dtype code


class Text:
    """A text as ids of a dictionary. It can be read more than once.

    Attributes:
        path: the path that was given.
        bytes: size, for progress.
        tokens: number of tokens found by the last reading, including the `</s>` of every line.
        unknown: number of these tokens that the dictionary lacks.
    """

    path: Path
    bytes: int
    tokens = 0
    unknown = 0

    def blocks(self, advance: Callable[[int], object] = lambda size: None) -> Iterator[np.ndarray]:
        """Yield the ids in order, int64 `[S]`, and call `advance` with the bytes of each block.

        Raises:
            UserError: if the text is damaged, empty, or of another dictionary.
        """
        self.tokens = self.unknown = 0
        for id_S, size in self._blocks():
            self.tokens += len(id_S)
            yield id_S
            advance(size)
        if not self.tokens:
            raise UserError(f"{self.path} has no tokens; give a text to count")

    def say_unknown(self, say: Callable[[str], object]) -> None:
        """Say how many tokens the dictionary lacks, if the last reading found some."""
        if self.unknown:
            say(
                f"note: {self.unknown:,} of {self.tokens:,} tokens of {self.path} are symbols that the dictionary "
                "lacks; they are counted as <unk>"
            )

    def _blocks(self) -> Iterator[tuple[np.ndarray, int]]:
        raise NotImplementedError


class BinarizedText(Text):
    """A text that fairseq-preprocess wrote to `PREFIX.bin` and `PREFIX.idx`."""

    def __init__(self, prefix: Path, symbols: list[str]) -> None:
        self.path, self.vocabulary = prefix, len(symbols)
        beside = prefix.parent / "dict.txt"
        if beside.is_file() and dictionary_fingerprint(read_dictionary(beside)[0]) != dictionary_fingerprint(symbols):
            raise UserError(f"{prefix} belongs to another dictionary, {beside}; give that dictionary, or another text")
        self.bin = with_suffix(prefix, ".bin")
        index = with_suffix(prefix, ".idx")
        try:
            with index.open("rb") as file:
                header = file.read(HEADER.size)
                magic, version, code, lines = HEADER.unpack(header) if len(header) == HEADER.size else (b"", 0, 0, 0)
                if magic != MAGIC or version != 1 or code not in DTYPES:
                    raise UserError(f"{index} is not an index that fairseq-preprocess wrote (--dataset-impl mmap)")
                # Before memory for so many lines is asked for: a damaged number can be any.
                if HEADER.size + LINE * lines != index.stat().st_size:
                    raise self._damaged(index, lines)
                size_L = np.fromfile(file, dtype="<i4", count=lines)
            self.dtype, self.bytes = np.dtype(DTYPES[code]), self.bin.stat().st_size
        except OSError as error:
            raise UserError(f"cannot read {error.filename} ({error.strerror})") from None
        is_whole = len(size_L) == lines and int(size_L.min(initial=0)) >= 0
        if not is_whole or int(size_L.sum(dtype=np.int64)) * self.dtype.itemsize != self.bytes:
            raise self._damaged(index, lines)

    def _damaged(self, index: Path, lines: int) -> UserError:
        return UserError(
            f"{self.bin} is damaged: its size differs from that in {index.name}, which says that there are {lines:,} "
            "lines; binarize the text again"
        )

    def _blocks(self) -> Iterator[tuple[np.ndarray, int]]:
        with self.bin.open("rb") as file:
            while len(id_S := np.fromfile(file, dtype=self.dtype, count=BLOCK)):
                low, high = int(id_S.min()), int(id_S.max())
                if low < 0 or high >= self.vocabulary:
                    raise UserError(
                        f"{self.bin} has the token id {low if low < 0 else high}, but the dictionary has ids 0 to "
                        f"{self.vocabulary - 1}; give the dictionary with which the text was binarized"
                    )
                yield id_S.astype(np.int64), id_S.nbytes


class SymbolText(Text):
    """A file of symbols with white space between them, one sentence per line, as fairseq-preprocess takes it."""

    def __init__(self, path: Path, symbols: list[str]) -> None:
        self.path, self.index, self.bytes = path, indices(symbols), path.stat().st_size

    def _blocks(self) -> Iterator[tuple[np.ndarray, int]]:
        place = 0
        try:
            with self.path.open(encoding="utf-8") as file:
                while lines := file.readlines(BLOCK):
                    ids: list[int] = []
                    for line in lines:
                        ids += [self.index.get(word, -1) for word in line.split()]
                        ids.append(END)
                    id_S = np.array(ids, dtype=np.int64)
                    self.unknown += int((id_S < 0).sum())
                    id_S[id_S < 0] = UNKNOWN
                    before, place = place, file.buffer.tell()
                    yield id_S, place - before
        except UnicodeDecodeError:
            raise UserError(f"{self.path} is not text in UTF-8; give a text of the dictionary's symbols") from None
        except OSError as error:
            raise UserError(f"cannot read {self.path} ({error.strerror})") from None


def open_text(path: Path, subset: str, symbols: list[str]) -> Text:
    """Open a text: a data folder with its `subset`, a binarized one without its suffix, or a file of symbols.

    Raises:
        UserError: if there is no text, or a binarized one is damaged or belongs to another dictionary.
    """
    prefix = path / subset if path.is_dir() else path
    if path.suffix in (".bin", ".idx") and with_suffix(path.with_suffix(""), ".idx").is_file():
        prefix = path.with_suffix("")
    if with_suffix(prefix, ".idx").is_file():
        return BinarizedText(prefix, symbols)
    if path.is_dir():
        raise UserError(f"{path} has no {subset}.idx; give a folder that fairseq-preprocess wrote, or another subset")
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; give a file of symbols, a binarized text without .bin and .idx, or a data folder"
        )
    return SymbolText(path, symbols)


def with_suffix(prefix: Path, suffix: str) -> Path:
    """Return the path with one more suffix: names of subsets may have dots."""
    return prefix.with_name(prefix.name + suffix)
