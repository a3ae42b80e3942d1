"""From lines of tokens to fairseq's training data: the dictionary, and `fairseq-preprocess` chunk by chunk.

`fairseq-preprocess` keeps about 80 bytes per line in memory, which is too much for large corpora. So it is called on
chunks, and the results are joined to exactly the files that one call on the whole text would have written.
"""

import os
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from fairseq.data import Dictionary

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import atomic_write

SPLITS = ("train", "valid", "test")
BLOCK = 1 << 20

# The index file of fairseq/data/indexed_dataset.py: magic, version (8 bytes), dtype code (1), length (8); then the
# number of tokens of every line (int32) and the byte where it starts (int64).
HEADER = struct.Struct("<9sQBQ")
MAGIC = b"MMIDIDX\x00\x00"
TOKEN_TYPES = {8: "<u2", 9: "<u4", 5: "<i8"}  # by dtype code: up to 65,499 symbols, more, and many more


def make_dictionary(counts: Counter[str], pieces: "Iterable[str] | None", most: "int | None", least: int) -> Dictionary:
    """Return fairseq's dictionary of token counts: by descending count, padded to a multiple of 8 symbols.

    Args:
        counts: the count of each token in the training text.
        pieces: all pieces of a SentencePiece model: exactly these are the symbols, even if some do not occur. None: the
            tokens that occur.
        most: largest number of symbols, including fairseq's four special ones; None: no limit.
        least: the smallest count with which a token becomes a symbol.
    """
    dictionary = Dictionary()
    for token in counts if pieces is None else pieces:
        dictionary.add_symbol(token, n=counts[token])
    dictionary.finalize(threshold=-1 if pieces is not None else least, nwords=most or -1, padding_factor=8)
    # A rare word can be one of the words that pad the dictionary (madeupword0000).
    dictionary.count[dictionary.nspecial :] = [counts[symbol] for symbol in dictionary.symbols[dictionary.nspecial :]]
    return dictionary


def preprocess(
    chunks: dict[str, Path], dictionary: Path, folder: Path, running: "list[subprocess.Popen[bytes]]"
) -> None:
    """Run `fairseq-preprocess` on one file per split. Its files appear in `folder` when all are complete.

    The process is put on the list `running`, so that another thread can end it.

    Raises:
        UserError: if it fails, with its last line and the path of its output.
    """
    # A folder for this process only: a killed call may have left a child that still writes.
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    prefixes = [word for split, path in chunks.items() for word in (f"--{split}pref", str(path))]
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source", *prefixes]
    command += ["--srcdict", str(dictionary), "--destdir", str(partial)]
    log = partial / "output.log"
    with log.open("w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        running.append(child)
        status = child.wait()
    if status:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        raise UserError(f"fairseq-preprocess failed ({last}); its output is in {log}")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def join(parts: Sequence[Path], target: Path) -> None:
    """Join binarized parts (paths without suffix) to `TARGET.bin` and `TARGET.idx`. The index appears last, and whole.

    Raises:
        UserError: if a part was not written by `fairseq-preprocess`.
    """
    heads = [_read_header(part) for part in parts]
    if len({code for code, _ in heads}) > 1:
        raise UserError(f"the parts of {target} have tokens of different types; delete its folder and start again")
    code = heads[0][0]
    with atomic_write(target.with_suffix(".bin")) as partial, partial.open("wb") as out:
        for part in parts:
            with part.with_suffix(".bin").open("rb") as file:
                shutil.copyfileobj(file, out, BLOCK)
    with atomic_write(target.with_suffix(".idx")) as partial, partial.open("wb") as out:
        out.write(HEADER.pack(MAGIC, 1, code, sum(length for _, length in heads)))
        for part, (_, length) in zip(parts, heads, strict=True):
            out.write(_sizes(part, length).tobytes())
        start = 0
        for part, (_, length) in zip(parts, heads, strict=True):
            bounds = np.zeros(length + 1, dtype="<i8")
            np.cumsum(_sizes(part, length), out=bounds[1:])
            bounds = start + bounds * np.dtype(TOKEN_TYPES[code]).itemsize
            out.write(bounds[:-1].tobytes())
            start = bounds[-1]


def count_symbols(data: Path, symbols: int) -> tuple[int, int, np.ndarray]:
    """Count the contents of binarized data (a path without suffix), block by block.

    Returns:
        Lines and tokens (including line ends) by `DATA.idx`; and the count of each of a dictionary's `symbols` in
        `DATA.bin`, int64 `[V]`.

    Raises:
        UserError: if the index was not written by fairseq, or a token is not a symbol.
    """
    code, lines = _read_header(data)
    count_V = np.zeros(symbols, dtype=np.int64)
    with data.with_suffix(".bin").open("rb") as file:
        while len(block := np.fromfile(file, dtype=TOKEN_TYPES[code], count=BLOCK)):
            found = np.bincount(block, minlength=symbols)
            if len(found) > symbols:
                raise UserError(f"{data}.bin has a token that is not a symbol; delete its folder and start again")
            count_V += found
    return lines, int(_sizes(data, lines).sum(dtype=np.int64)), count_V


def _read_header(part: Path) -> tuple[int, int]:
    with part.with_suffix(".idx").open("rb") as file:
        magic, version, code, length = HEADER.unpack(file.read(HEADER.size))
    if magic != MAGIC or version != 1 or code not in TOKEN_TYPES:
        raise UserError(f"{part}.idx is not an index of fairseq's; delete its folder and start again")
    return code, length


def _sizes(part: Path, length: int) -> np.ndarray:
    return np.fromfile(part.with_suffix(".idx"), dtype="<i4", count=length, offset=HEADER.size)
