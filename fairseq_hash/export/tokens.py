"""The dictionary and the SentencePiece model of a checkpoint: found, checked, and written for the tokenizer."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_hash.core.errors import UserError
from fairseq_hash.export.config import TOKENIZATION
from fairseq_hash.hashing import dictionary_fingerprint
from fairseq_hash.hashing.dictionary import read_dictionary

DICTIONARY, PIECES = "dict.txt", "sentencepiece.model"  # the names in the data folder, as data_prep writes them
BEGIN = "\u2581"  # SentencePiece's mark of a word's beginning


@dataclass(frozen=True)
class Tokens:
    """The vocabulary that turns text into ids.

    Attributes:
        symbols: of fairseq's dictionary, in the order of their ids.
        pieces: the SentencePiece model; None if tokens are words between white space.
        begin: the symbol with which every sample begins.
    """

    symbols: Sequence[str]
    pieces: "Path | None"
    begin: str

    def write(self, folder: Path, max_length: int) -> None:
        """Write the files that the tokenizer reads."""
        (folder / "vocab.json").write_text(json.dumps(self.symbols, ensure_ascii=False, indent=0), encoding="utf-8")
        if self.pieces is not None:
            shutil.copyfile(self.pieces, folder / PIECES)
        special = {"bos_token": self.begin, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        config = {
            "auto_map": {"AutoTokenizer": [f"{TOKENIZATION}.FairseqHashTokenizer", None]},
            "tokenizer_class": "FairseqHashTokenizer",
            "model_max_length": max_length,
            "padding_side": "left",  # generation needs this
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
            **special,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1) + "\n", encoding="utf-8")

    @property
    def config(self) -> dict[str, int]:
        """The token ids for `config.json` and `generation_config.json`."""
        return {"bos_token_id": self.symbols.index(self.begin), "eos_token_id": 2, "pad_token_id": 1}


def find_tokens(
    path: Path,
    state: Mapping[str, Any],
    fingerprint: "str | None",
    vocabulary: int,
    data: "Path | None",
    pieces: "Path | None",
) -> Tokens:
    """Return the tokens of a checkpoint.

    `state` is the checkpoint's, and names the data folder of the training; `fingerprint` is that of its dictionary,
    None if not known; `vocabulary` is the number of rows of its embedding. `data` is the folder with dict.txt and, for
    pieces, sentencepiece.model; None for that of the training, or the checkpoint's own. `pieces` is the SentencePiece
    model; None for that in the folder. Raises `UserError` if one of them is missing, or belongs to other data.
    """
    task = (state.get("cfg") or {}).get("task") or {}
    where = data if data is not None else Path(str(task.get("data") or "").split(":")[0])
    if data is None and not (where / DICTIONARY).is_file() and (path.parent / DICTIONARY).is_file():
        where = path.parent
    if not (where / DICTIONARY).is_file():
        raise UserError(f"{where / DICTIONARY} does not exist; give the folder of the training's data by --data")
    symbols, counts = read_dictionary(where / DICTIONARY)
    if len(symbols) != vocabulary or fingerprint not in (None, dictionary_fingerprint(symbols)):
        raise UserError(
            f"{where / DICTIONARY} is not the dictionary with which {path} was trained; give the folder of the "
            "training's data by --data"
        )
    if pieces is None and (where / PIECES).is_file():
        pieces = where / PIECES
    if pieces is not None:
        _check_pieces(pieces, symbols)
    elif _has_pieces(symbols, counts):
        raise UserError(
            f"{where / DICTIONARY} has pieces of SentencePiece ({BEGIN}) and {where / PIECES} does not exist; give the "
            "model by --sentencepiece"
        )
    return Tokens(symbols, pieces, "<s>" if task.get("add_bos_token") else "</s>")


def _has_pieces(symbols: Sequence[str], counts: Sequence[int]) -> bool:
    """Return whether the symbols are pieces of words; a few pieces among words are not enough."""
    marked = sum(count for symbol, count in zip(symbols, counts, strict=True) if symbol.startswith(BEGIN))
    return 100 * marked > sum(counts)


def _check_pieces(path: Path, symbols: Sequence[str]) -> None:
    """Raise `UserError` if a file is not a SentencePiece model, or belongs to another dictionary."""
    import sentencepiece

    if not path.is_file():
        raise UserError(f"--sentencepiece {path} does not exist; give the model with which the data was cut")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        known = {processor.id_to_piece(number) for number in range(processor.get_piece_size())}
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        raise UserError(
            f"--sentencepiece {path} is not a SentencePiece model; give the one with which the data was cut"
        ) from error
    # Characters that a model does not know are also symbols, unless the model falls back to bytes.
    own = [symbol for symbol in symbols[4:] if not symbol.startswith("madeupword")]
    others = [symbol for symbol in own if symbol not in known]
    if len(others) > len(own) / 10:
        raise UserError(
            f"{path} does not cut text into the symbols of the dictionary: {len(others)} of {len(own)} are none of "
            f"its pieces, such as {others[0]!r}; give the model with which the data was cut"
        )
