"""fairseq's dictionary of a text, and the binarized data that `fairseq-preprocess` would make of the same tokens."""

from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDataset, MMapIndexedDatasetBuilder, best_fitting_int_dtype

from fairseq_hash.core.errors import UserError

BLOCK = 1 << 20


class CompactBuilder(MMapIndexedDatasetBuilder):
    """fairseq's builder, with at most 28 bytes of memory per line instead of 80, which is too much for large text."""

    def __init__(self, file: str, dtype: type[np.integer]) -> None:
        super().__init__(file, dtype)
        self._sizes = array("i")

    def finalize(self, index_file: str) -> None:
        """Write the index, with the places of the lines as an array instead of a list."""
        self._data_file.close()
        with MMapIndexedDataset.Index.writer(index_file, self._dtype) as index:
            index._get_pointers = self._places
            index.write(self._sizes)

    def _places(self, sizes: array) -> np.ndarray:
        places = np.zeros(len(sizes) + 1, dtype=np.int64)
        np.cumsum(sizes, out=places[1:])
        places *= np.dtype(self._dtype).itemsize
        return places[:-1]


def make_dictionary(counts: Counter[str], pieces: "Iterable[str] | None", most: "int | None", least: int) -> Dictionary:
    """Return fairseq's dictionary of token counts: by descending count, padded to a multiple of 8 symbols.

    `pieces` are all pieces of a SentencePiece model: exactly these are the symbols, even if some do not occur. None:
    the tokens that occur, at least `least` times. `most` is the largest number of symbols, including fairseq's four
    special ones; None: no limit.
    """
    dictionary = Dictionary()
    for token in counts if pieces is None else pieces:
        dictionary.add_symbol(token, n=counts[token])
    dictionary.finalize(threshold=-1 if pieces is not None else least, nwords=most or -1, padding_factor=8)
    # A rare word can be one of the words that pad the dictionary (madeupword0000).
    dictionary.count[dictionary.nspecial :] = [counts[symbol] for symbol in dictionary.symbols[dictionary.nspecial :]]
    return dictionary


def binarize(batches: Iterable[tuple[np.ndarray, list[int]]], symbols: int, data: Path) -> None:
    """Write `DATA.bin` and `DATA.idx` (`data` is a path without suffix).

    A batch has the ids of the tokens of its lines, int64 `[tokens]`, and the lengths of the lines. `symbols` is the
    number of those of the dictionary.
    """
    builder = CompactBuilder(f"{data}.bin", best_fitting_int_dtype(symbols))
    for ids, lengths in batches:
        for line in torch.from_numpy(ids).split(lengths):
            builder.add_item(line)
    builder.finalize(f"{data}.idx")


def count_symbols(data: Path, symbols: int) -> tuple[int, int, np.ndarray]:
    """Count the contents of binarized data (a path without suffix), block by block.

    Returns:
        Lines and tokens (including line ends) by `DATA.idx`; and the count of each of a dictionary's `symbols` in
        `DATA.bin`, int64 `[V]`.

    Raises:
        UserError: if a token is not a symbol.
    """
    index = MMapIndexedDataset.Index(f"{data}.idx")
    count_V = np.zeros(symbols, dtype=np.int64)
    with open(f"{data}.bin", "rb") as file:
        while len(block := np.fromfile(file, dtype=index.dtype, count=BLOCK)):
            found = np.bincount(block, minlength=symbols)
            if len(found) > symbols:
                raise UserError(f"{data}.bin has a token that is not a symbol; delete its folder and start again")
            count_V += found
    return len(index), int(index.sizes.sum(dtype=np.int64)), count_V
