"""A trained language model for inspection: logits, probabilities, routes, hash tables, samples."""

import logging
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from fairseq.data import Dictionary
from fairseq.models import FairseqLanguageModel
from fairseq.tasks.language_modeling import LanguageModelingTask
from torch import Tensor

from fairseq_hash.api.routes import hash_tables, route
from fairseq_hash.api.sampling import Sample, Sampling, sample
from fairseq_hash.api.tokenizer import Pieces, Words
from fairseq_hash.checkpoint.model_state import state_of
from fairseq_hash.core.errors import UserError

logger = logging.getLogger(__name__)

# A text, or its token ids (int64 `[L]`).
Text = str | Tensor | Sequence[int]


class LanguageModel:
    """A language model for inference; `load` returns one.

    A text of L tokens is read after a start symbol, as in `fairseq-eval-lm`. So the model reads L + 1 tokens, and the
    token at position i predicts the token at position i + 1. The end of a line is the token `</s>`.

    Every method takes a text, or its int64 token ids `[L]` from `tokenize`. It raises `UserError` with one line if the
    text has no tokens, has more than `max_tokens`, or has ids that the dictionary lacks.

    Attributes:
        model: fairseq's model, in evaluation mode, fp32, without gradients.
        task: fairseq's task `language_modeling`.
        configuration: the options of the training.
        dictionary: fairseq's `Dictionary`: `dictionary.symbols`, `dictionary.index(symbol)`.
    """

    def __init__(
        self,
        model: FairseqLanguageModel,
        task: LanguageModelingTask,
        configuration: Any,
        tokenizer: "Words | Pieces | None",
    ) -> None:
        """Take the loaded parts. `tokenizer` is None if only token ids can be given."""
        self.model, self.task, self.configuration = model, task, configuration
        self.dictionary: Dictionary = task.source_dictionary
        self._tokenizer = tokenizer

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    @property
    def max_tokens(self) -> int:
        """The largest number of tokens in a text that the model can read at once."""
        return self.model.max_positions() - 1

    @property
    def num_experts(self) -> int:
        """E, experts of each sparse layer; 0 for a dense model."""
        return self.model.decoder.options.num_experts if getattr(self.model.decoder, "places", None) else 0

    @property
    def tables(self) -> dict[int, pd.DataFrame]:
        """The hash table of each hash layer, by the number of its decoder layer.

        Columns: `row` (int), `token` (str; missing if the rows are not tokens, as with `--hash-feature bigram`),
        `choice` (int: which of the token's K experts, or of MultiHash's segments), `expert` (int).
        """
        return hash_tables(self.model, self.dictionary)

    def tokenize(self, text: str) -> Tensor:
        """Return the token ids of a text, int64 `[L]`, on the CPU, with `</s>` between two lines.

        If the dictionary lacks words, they become `<unk>`, and a warning is logged.

        Raises:
            UserError: if the dictionary's symbols are pieces and there is no SentencePiece model.
        """
        if self._tokenizer is None:
            raise UserError(
                "the dictionary has pieces of words, and there is no sentencepiece.model beside it; give the "
                "SentencePiece model with which the data was prepared, or token ids"
            )
        symbols: list[str] = []
        for number, line in enumerate(text.split("\n")):
            symbols += [self.dictionary.eos_word] * (number > 0) + self._tokenizer.encode(line)
        unknown = [symbol for symbol in symbols if symbol not in self.dictionary]
        if unknown:
            logger.warning(
                "note: %d of %d tokens are not in the dictionary and are read as <unk>: %s",
                len(unknown),
                len(symbols),
                ", ".join(list(dict.fromkeys(unknown))[:5]),
            )
        return torch.tensor([self.dictionary.index(symbol) for symbol in symbols], dtype=torch.int64)

    def detokenize(self, tokens: "Tensor | Sequence[int]") -> str:
        """Return token ids `[L]` as a text: the inverse of `tokenize`, up to white space."""
        tokenizer = self._tokenizer or Words()
        lines: list[list[str]] = [[]]
        for token in map(int, tokens):
            if token == self.dictionary.eos():
                lines.append([])
            else:
                lines[-1].append(self.dictionary[token])
        return "\n".join(tokenizer.decode(line) for line in lines)

    def read(self, text: Text) -> Tensor:
        """Return the tokens that the model reads: int64 `[1, L + 1]`, the start symbol first, on the model's device."""
        tokens = self.tokenize(text) if isinstance(text, str) else torch.as_tensor(text)
        if tokens.dim() != 1 or not len(tokens):
            what = "the text has no token" if tokens.dim() == 1 else f"token ids of shape {tuple(tokens.shape)}"
            raise UserError(f"{what}; give some text, or token ids of shape [L]")
        if tokens.dtype.is_floating_point or not 0 <= int(tokens.min()) <= int(tokens.max()) < len(self.dictionary):
            raise UserError(f"the token ids are not all integers from 0 to {len(self.dictionary) - 1}; see tokenize")
        if len(tokens) > self.max_tokens:
            raise UserError(
                f"the text has {len(tokens):,} tokens, but the model reads {self.max_tokens:,} at once; give a "
                "shorter text"
            )
        return torch.cat([torch.tensor([self.start]), tokens.cpu().long()]).unsqueeze(0).to(self.device)

    @property
    def start(self) -> int:
        """The id of the start symbol, which precedes every text."""
        has_begin = getattr(self.task.args, "add_bos_token", False)
        return self.dictionary.bos() if has_begin else self.dictionary.eos()

    @torch.no_grad()
    def logits(self, text: Text) -> Tensor:
        """Return the logits of each next token: fp32 `[L + 1, V]`, on the model's device.

        Row i predicts the token at position i + 1: the first row the first token, the last row what follows the text.

        Raises:
            UserError: for a model with an adaptive softmax, which has no logits.
        """
        if getattr(self.model.decoder, "adaptive_softmax", None) is not None:
            raise UserError("a model with an adaptive softmax has no logits; use log_probabilities")
        return self.model(self.read(text))[0][0].float()

    @torch.no_grad()
    def log_probabilities(self, text: Text) -> Tensor:
        """Return the log-probabilities of each next token, in nats: fp32 `[L + 1, V]`, rows as in `logits`."""
        output = self.model(self.read(text))
        return self.model.get_normalized_probs(output, log_probs=True)[0].float()

    def next_token_probabilities(self, text: Text, top: int = 10) -> pd.DataFrame:
        """Return the most probable next tokens after a text, most probable first.

        Args:
            text: the text before the next token.
            top: number of tokens, 1 to V.

        Returns:
            Columns `token` (str), `id` (int) and `probability` (float).

        Raises:
            UserError: for another `top`, and for an oracle, which sees the token that it predicts.
        """
        self._require_no_oracle()
        size = len(self.task.target_dictionary)
        if not 1 <= top <= size:
            raise UserError(f"top {top} is out of range; give 1 to {size:,}, the size of the dictionary")
        probability, token = self.log_probabilities(text)[-1].exp().topk(top)
        symbols = [self.dictionary[index] for index in token.tolist()]
        return pd.DataFrame({"token": symbols, "id": token.tolist(), "probability": probability.tolist()})

    def routes(self, text: Text) -> pd.DataFrame:
        """Return which experts serve each token that is read.

        Returns:
            One row for each position, sparse layer and expert of the token. Columns: `position` (int; 0 is the start
            symbol), `token` (str), `layer` (int, of the decoder, from 0), `router` (str), `choice` (int: which of the
            token's K experts, or of MultiHash's segments), `expert` (int), `weight` (float, the factor on the expert's
            output) and `dropped` (bool: the expert was full and did not serve the token). No rows for a dense model.
            With `--router expert-choice`, a token that no expert chose has one row, with `dropped`.
        """
        return route(self.model, self.read(text), self.dictionary)

    def routes_read(self, read: Tensor, position: int = 0) -> pd.DataFrame:
        """Return `routes` of a block of a longer text: token ids `[L]`, without an added start symbol.

        Args:
            read: int64 `[L]`, 1 to `max_tokens` + 1 ids.
            position: of the block's first token in the text.
        """
        table = route(self.model, read.unsqueeze(0).to(self.device), self.dictionary)
        table["position"] += position
        return table

    def sample(self, text: "Text | None" = None, sampling: "Sampling | None" = None, **options: Any) -> list[Sample]:
        """Continue a text, or begin a line, by fairseq's generator.

        Args:
            text: one line; None begins a new line.
            sampling: the options, which can also be given by name as fields of `Sampling`: `length`, `number`,
                `temperature`, `top_k`, `top_p`, `beam`, `seed`.

        Returns:
            Samples, by descending probability. Each ends at the given length or at the end of the line.

        Raises:
            UserError: for options out of range or that do not go together, a text of several lines, and an oracle.
        """
        self._require_no_oracle()
        sampling = Sampling(**options) if sampling is None else sampling
        read = torch.tensor([[self.start]], device=self.device) if text is None else self.read(text)
        return sample(self.model, self.task, read, sampling, self.detokenize)

    def _require_no_oracle(self) -> None:
        state = state_of(self.model)
        if state.is_oracle:
            raise UserError(
                f"{state.options.oracle} sees the token that it is to predict; such a model predicts no text"
            )
