"""Options of data preparation, and their checks before work starts."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.json_text import parse_object
from fairseq_hash.core.options import option
from fairseq_hash.hashing.dictionary import read_dictionary
from fairseq_hash.provenance import DATA_RECORD, sha256_of_file, usable_cores

MODEL, DICTIONARY, PROVENANCE = "sentencepiece.model", "dict.txt", DATA_RECORD


@dataclass(frozen=True)
class Options:
    """Options of data preparation. Raises `UserError` if a value is out of range."""

    words: bool = option(False, "tokens are words between spaces, as in reports on WikiText, instead of pieces")
    vocabulary: "int | None" = option(
        None,
        "pieces of the SentencePiece model, 256 of them bytes (default: 8000); with --words the largest number of "
        "symbols (default: no limit)",
        flag="--vocab-size",
        metavar="N",
    )
    least_count: int = option(1, "with --words: rarer words become <unk>", flag="--min-count", metavar="N")
    like: "Path | None" = option(None, "use the model and dictionary of data prepared before", metavar="DIR")
    seed: int = option(1, "seed of the sample on which the model is trained", metavar="N")
    workers: int = option(usable_cores(), "number of processes (default: all usable cores)", metavar="N")

    def __post_init__(self) -> None:
        if self.vocabulary is not None and not 8 <= self.vocabulary <= 10_000_000:
            raise UserError(f"--vocab-size {self.vocabulary} is out of range; give a number from 8 to 10,000,000")
        for name, value in (("min-count", self.least_count), ("workers", self.workers)):
            if not 1 <= value <= 1_000_000:
                raise UserError(f"--{name} {value} is out of range; give a number of 1 or more")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed} is out of range; give a number of 0 or more")
        if self.least_count > 1 and not self.words:
            raise UserError(
                f"--min-count {self.least_count} is for --words; a SentencePiece model has a fixed vocabulary"
            )
        if self.like and (self.vocabulary is not None or self.least_count > 1):
            raise UserError(
                "--like takes model and dictionary from that folder; leave out --vocab-size and --min-count"
            )
        if self.like:
            check_like(self.like, self.words)

    def identity(self) -> dict[str, Any]:
        """Return the options that determine the data, JSON-ready."""
        kept = {key: value for key, value in asdict(self).items() if key not in ("workers", "like")}
        return kept | {"like": self.like and sha256_of_file(self.like / DICTIONARY)}


def check_like(folder: Path, words: bool) -> None:
    """Raise `UserError` if the model and the dictionary of a folder cannot serve for other text."""
    needed = [DICTIONARY, PROVENANCE] + ([] if words else [MODEL])
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise UserError(f"--like {folder} has no {missing[0]}; give a folder that fairseq-hash data made")
    made_by_words = identity_in(folder).get("words")
    if made_by_words is not None and made_by_words != words:
        remedy = "leave out --words" if words else "give --words, too"
        raise UserError(f"--like {folder} was made of {'words' if made_by_words else 'pieces'}; {remedy}")
    symbols, _ = read_dictionary(folder / DICTIONARY)
    if twice := [symbol for symbol, count in Counter(symbols).items() if count > 1]:
        # fairseq-preprocess reads it, but writes it without the mark, and fairseq-train refuses what it wrote.
        raise UserError(
            f"--like {folder}: {DICTIONARY} has {twice[0]!r} twice (#fairseq:overwrite), which fairseq-preprocess "
            "does not keep; give a dictionary with one line per symbol"
        )


def identity_in(folder: Path) -> dict[str, Any]:
    """Return what a folder of data was made of, nothing if its record does not say."""
    identity = read_json(folder / PROVENANCE).get("identity")
    return identity if isinstance(identity, dict) else {}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds, nothing if it holds none or cannot be read."""
    try:
        return parse_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
