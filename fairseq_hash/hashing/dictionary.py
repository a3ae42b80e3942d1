"""Dictionaries, counts and vocabularies from files, read without fairseq."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from fairseq_hash.core.errors import UserError

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3 of every fairseq dictionary, each with count 1
PADDING, END, UNKNOWN = 1, 2, 3
OVERWRITE = "#fairseq:overwrite"


def read_dictionary(path: Path) -> tuple[list[str], list[int]]:
    """Return symbols and counts of a dict.txt, the four special ones first, as `fairseq.data.Dictionary.load` has them.

    Raises:
        UserError: if the file is missing or is not a dictionary.
    """
    symbols, counts = list(SPECIAL), [1] * len(SPECIAL)
    known = set(symbols)
    # fairseq's own reader refuses a blank line, too, with a traceback.
    for number, line in _lines(path, "the dict.txt that fairseq-preprocess wrote", "fairseq dictionary", True):
        word, _, field = line.rstrip().rpartition(" ")
        overwrites = field == OVERWRITE
        if overwrites:
            word, _, field = word.rpartition(" ")
        if not word or not _is_count(field):
            raise UserError(f"{path} is no fairseq dictionary: line {number} is not a symbol and its count")
        if word in known and not overwrites:
            raise UserError(
                f"{path} is no fairseq dictionary: line {number} repeats the symbol {word!r}; end that line with "
                f"{OVERWRITE}, which fairseq-preprocess does not write"
            )
        known.add(word)
        symbols.append(word)
        counts.append(int(field))
    return symbols, counts


def indices(symbols: Sequence[str]) -> dict[str, int]:
    """Return each symbol's id; if a symbol was overwritten, the later id, as in fairseq."""
    return {symbol: number for number, symbol in enumerate(symbols)}


def read_counts(path: Path, symbols: Sequence[str]) -> tuple[np.ndarray, int]:
    """Return the counts in a file of `symbol count` lines, and the number of its symbols that the dictionary lacks.

    Returns:
        int64 `[V]`, 0 for symbols that the file lacks; the number of unknown symbols.

    Raises:
        UserError: if the file is missing, a line has another form, a symbol comes twice, or all counts are 0.
    """
    index, count_V = indices(symbols), np.zeros(len(symbols), dtype=np.int64)
    seen: set[str] = set()
    unknown = 0
    for number, line in _lines(path, "a file of lines `symbol count`", "file of counts"):
        word, field = [*line.rsplit(maxsplit=1), ""][:2]
        if not word or not _is_count(field):
            raise UserError(f"{path} is no file of counts: line {number} is not a symbol and its count of 0 or more")
        if word in seen:
            raise UserError(f"{path} is no file of counts: line {number} repeats the symbol {word!r}; remove one")
        seen.add(word)
        if word in index:
            count_V[index[word]] = int(field)
        else:
            unknown += 1
    if not count_V.any():
        raise UserError(f"{path} counts no symbol of the dictionary above 0; give counts of this dictionary's symbols")
    return count_V, unknown


def token_counts(
    counts: "Path | None", dictionary: Path, symbols: Sequence[str], listed: Sequence[int], say: Callable[[str], object]
) -> tuple[np.ndarray, str]:
    """Return the counts of a file, or else those of the dictionary, int64 `[V]`, and the name of their source.

    `say` gets a line if the file counts symbols that the dictionary lacks.
    """
    if counts is None:
        return np.asarray(listed, dtype=np.int64), f"dictionary {dictionary.name}"
    count_V, unknown = read_counts(counts, symbols)
    if unknown:
        say(f"note: {unknown:,} symbols of {counts} are not in the dictionary; their counts are left out")
    return count_V, f"counts {counts.name}"


def read_vocabulary(path: Path) -> list[str]:
    """Return another framework's symbols in the order of its ids.

    The file has one symbol per line, or is a SentencePiece .vocab (symbol, tab, score).

    Raises:
        UserError: if the file is missing or empty, or a symbol comes twice.
    """
    lines = [line for _, line in _lines(path, "a file of one symbol per line", "vocabulary", keeps_blanks=True)]
    if all(_is_score(line.rpartition("\t")[2]) and "\t" in line for line in lines):
        lines = [line.rpartition("\t")[0] for line in lines]
    if not lines:
        raise UserError(f"{path} is an empty vocabulary; give a file of one symbol per line")
    seen: dict[str, int] = {}
    for number, symbol in enumerate(lines, 1):
        if symbol in seen:
            raise UserError(f"{path} has the symbol {symbol!r} in lines {seen[symbol]} and {number}; remove one")
        seen[symbol] = number
    return lines


def _lines(path: Path, wanted: str, kind: str, keeps_blanks: bool = False) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers from 1.

    Without `keeps_blanks`, blanks at the end of lines and blank lines are left out.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; give {wanted}")
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                line = line.rstrip("\n") if keeps_blanks else line.rstrip()
                if line or keeps_blanks:
                    yield number, line
    except UnicodeDecodeError:
        raise UserError(f"{path} is no {kind}: it is not text in UTF-8; give {wanted}") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give {wanted}") from None


def _is_count(field: str) -> bool:
    return field.isascii() and field.isdigit() and len(field) < 19  # int64


def _is_score(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
