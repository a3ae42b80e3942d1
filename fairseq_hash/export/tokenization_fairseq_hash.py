"""The tokenizer of a language model that fairseq trained: the ids are those of fairseq's dictionary.

If `sentencepiece.model` is beside this file, text is first cut into SentencePiece's pieces; otherwise tokens are words
between white space. This file needs transformers, and sentencepiece if there is such a model.
"""

import json
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizer

RESERVED = ("<s>", "<pad>", "</s>")  # in a text they are not special tokens, as in the training data


class FairseqHashTokenizer(PreTrainedTokenizer):
    """Text to ids, and back.

    A text begins with `bos_token`, as every sample does in training (fairseq begins with `</s>`, the end of the line
    before); `add_special_tokens=False` leaves it out. The end of a line is `</s>`. White space within a line only
    separates tokens. A special token written in a text is ordinary text.
    """

    vocab_files_names = {"vocab_file": "vocab.json", "model_file": "sentencepiece.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, model_file: "str | None" = None, **kwargs: object) -> None:
        """Read the dictionary's symbols (a JSON list in the order of their ids) and the SentencePiece model."""
        self.vocab_file, self.model_file, self.processor = vocab_file, model_file, None
        self.symbols = json.loads(Path(vocab_file).read_text(encoding="utf-8"))
        self.ids = {symbol: number for number, symbol in enumerate(self.symbols)}
        if model_file:
            import sentencepiece

            self.processor = sentencepiece.SentencePieceProcessor(model_file=model_file)
        kwargs.setdefault("split_special_tokens", True)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """The number of the dictionary's symbols."""
        return len(self.symbols)

    def get_vocab(self) -> "dict[str, int]":
        """Return the id of every symbol."""
        return {**self.ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: object) -> "list[str]":
        tokens = []
        for number, line in enumerate(text.split("\n")):
            found = line.split()
            if self.processor is not None:
                found = self.processor.encode(" ".join(found), out_type=str)
            tokens += [self.eos_token] * (number > 0) + ["<unk>" if token in RESERVED else token for token in found]
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self.ids.get(token, self.ids["<unk>"])

    def _convert_id_to_token(self, index: int) -> str:
        return self.symbols[index]

    def convert_tokens_to_string(self, tokens: "list[str]") -> str:
        """Join tokens: pieces to words, bytes to characters, lines with their ends."""
        lines = [[]]
        for token in tokens:
            if token == self.eos_token:
                lines.append([])
            else:
                lines[-1].append(token)
        return "\n".join(" ".join(line) if self.processor is None else self.processor.decode(line) for line in lines)

    def build_inputs_with_special_tokens(
        self, token_ids_0: "list[int]", token_ids_1: "list[int] | None" = None
    ) -> "list[int]":
        """Add the beginning; the second text of a pair continues the first."""
        return [self.bos_token_id, *token_ids_0, *(token_ids_1 or [])]

    def get_special_tokens_mask(
        self, token_ids_0: "list[int]", token_ids_1: "list[int] | None" = None, already_has_special_tokens: bool = False
    ) -> "list[int]":
        """Return 1 for special tokens, else 0."""
        if already_has_special_tokens:
            return [int(number in self.all_special_ids) for number in token_ids_0]
        return [1] + [0] * (len(token_ids_0) + len(token_ids_1 or []))

    def create_token_type_ids_from_sequences(
        self, token_ids_0: "list[int]", token_ids_1: "list[int] | None" = None
    ) -> "list[int]":
        """Return zeros: the model has no token types."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def save_vocabulary(self, save_directory: str, filename_prefix: "str | None" = None) -> "tuple[str, ...]":
        """Copy the two files, and return their paths."""
        made = []
        for source in filter(None, (self.vocab_file, self.model_file)):
            name = Path(source).name if filename_prefix is None else f"{filename_prefix}-{Path(source).name}"
            target = Path(save_directory) / name
            if not target.exists() or not target.samefile(source):
                shutil.copyfile(source, target)
            made.append(str(target))
        return tuple(made)
