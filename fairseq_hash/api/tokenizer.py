"""Text to the symbols of a dictionary and back: SentencePiece where there is a model, words otherwise."""

from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from fairseq.data import Dictionary

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing.words import BEGIN, JOIN

# What data_prep writes beside dict.txt, and what fairseq's hub interface looks for.
MODELS = ("sentencepiece.model", "sentencepiece.bpe.model")


# Words that fairseq's dictionary keeps for itself: in a text they are `<unk>`, as in the data of the training.
RESERVED = ("<s>", "<pad>", "</s>")


class Words:
    """Words are what white space separates, as fairseq sees them."""

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
            UserError: if it is none.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{path} is no SentencePiece model; give the one that the data was prepared with"
            ) from error

    def encode(self, line: str) -> list[str]:
        """Return the pieces of a line."""
        # One space for any white space, as `data_prep` does it: SentencePiece knows less of it than fairseq.
        return _without_reserved(self._processor.encode(" ".join(line.split()), out_type=str))

    def decode(self, symbols: Sequence[str]) -> str:
        """Return pieces as a line; the bytes of rare characters are put together."""
        return self._processor.decode_pieces(list(symbols))


def _without_reserved(symbols: list[str]) -> list[str]:
    return ["<unk>" if symbol in RESERVED else symbol for symbol in symbols]


def tokenizer_for(folder: Path, given: "Path | None", dictionary: Dictionary) -> "Words | Pieces | None":
    """Return what makes symbols of text: None if the symbols are pieces of a model that is not there.

    Args:
        folder: of the dictionary, in which a SentencePiece model is looked for.
        given: the SentencePiece model, where it lies elsewhere.
        dictionary: whose symbols are wanted.

    Raises:
        UserError: if `given` is no model.
    """
    found = [given] if given is not None else [folder / name for name in MODELS if (folder / name).is_file()]
    if found:
        return Pieces(found[0])
    counted = zip(dictionary.symbols, dictionary.count, strict=True)
    marked = sum(count for symbol, count in counted if symbol.startswith(BEGIN) or symbol.endswith(JOIN))
    return None if 100 * marked > sum(dictionary.count) else Words()  # a stray symbol among words is no mark
