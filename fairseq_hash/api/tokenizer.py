"""Converts text to the symbols of a dictionary and back: by SentencePiece if there is a model, otherwise by words."""

from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from fairseq.data import Dictionary

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing.words import BEGIN, JOIN

# The name that data_prep writes beside dict.txt, and the name that fairseq's hub interface looks for.
MODELS = ("sentencepiece.model", "sentencepiece.bpe.model")


# Words that fairseq's dictionary reserves. In a text they are `<unk>`, as in the training data.
RESERVED = ("<s>", "<pad>", "</s>")


class Words:
    """Words, separated by what fairseq takes for white space."""

    def encode(self, line: str) -> list[str]:
        """Return the words of a line."""
        return _without_reserved(line.split())

    def decode(self, symbols: Sequence[str]) -> str:
        """Return words as a line."""
        return " ".join(symbols)


class Pieces:
    """Pieces of a SentencePiece model."""

    def __init__(self, path: Path) -> None:
        """Read the model.

        Raises:
            UserError: if it is not a SentencePiece model.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self._processor.id_to_piece(list(range(self._processor.get_piece_size())))  # each can be read
        except (OSError, RuntimeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path} is not a SentencePiece model; give the one with which the data was prepared"
            ) from error

    def encode(self, line: str) -> list[str]:
        """Return the pieces of a line."""
        # One space for any white space, as in `data_prep`: SentencePiece knows fewer kinds of it than fairseq.
        return _without_reserved(self._processor.encode(" ".join(line.split()), out_type=str))

    def decode(self, symbols: Sequence[str]) -> str:
        """Return pieces as a line; the bytes of rare characters are joined."""
        return self._processor.decode_pieces(list(symbols))


def _without_reserved(symbols: list[str]) -> list[str]:
    return ["<unk>" if symbol in RESERVED else symbol for symbol in symbols]


def tokenizer_for(folder: Path, given: "Path | None", dictionary: Dictionary) -> "Words | Pieces | None":
    """Return the tokenizer; None if the symbols are pieces and their model is missing.

    `folder` is the dictionary's, in which a SentencePiece model is looked for, unless one is `given`. Raises
    `UserError` if that is not a SentencePiece model.
    """
    found = [given] if given is not None else [folder / name for name in MODELS if (folder / name).is_file()]
    if found:
        return Pieces(found[0])
    counted = zip(dictionary.symbols, dictionary.count, strict=True)
    marked = sum(count for symbol, count in counted if symbol.startswith(BEGIN) or symbol.endswith(JOIN))
    return None if 100 * marked > sum(dictionary.count) else Words()  # a few marked symbols among words do not count
