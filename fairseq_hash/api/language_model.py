"""A trained language model to look at: logits, probabilities, routes, hash tables, samples."""

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
    """A language model for inference; `load` makes one.

    A text of L tokens is read behind a start symbol, as in `fairseq-eval-lm`: what is "read" are L + 1 tokens, of which
    the one at position i predicts the one at position i + 1. A line's end is the token `</s>`.

    Every method takes a text, or the int64 ids `[L]` that `tokenize` makes of one, and raises `UserError` with one line
    for a text without tokens, of more than `max_tokens`, or with ids that the dictionary does not have.

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
        """Take what `load` has loaded; `tokenizer` is None if only token ids can be given."""
        self.model, self.task, self.configuration = model, task, configuration
        self.dictionary: Dictionary = task.source_dictionary
        self._tokenizer = tokenizer

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def max_tokens(self) -> int:
        """The most tokens of a text that the model can read at once."""
        return self.model.max_positions() - 1

    @property
    def num_experts(self) -> int:
        """E, experts of each sparse layer; 0 for a dense model."""
        return self.model.decoder.options.num_experts if getattr(self.model.decoder, "places", None) else 0

    @property
    def tables(self) -> dict[int, pd.DataFrame]:
        """The hash table of each hash layer, by the number of its decoder layer.

        Columns: `row` (int), `token` (str; missing where the rows are not tokens, as with `--hash-feature bigram`),
        `choice` (int: which of the token's K experts, or of MultiHash's segments), `expert` (int).
        """
        return hash_tables(self.model, self.dictionary)

    def tokenize(self, text: str) -> Tensor:
        """Return the token ids of a text, int64 `[L]`, on the CPU; between two lines stands `</s>`.

        A warning is logged where the dictionary lacks words; they are `<unk>`.

        Raises:
            UserError: if the dictionary's symbols are pieces and there is no SentencePiece model.
        """
        if self._tokenizer is None:
            raise UserError(
                "the dictionary has pieces of words, and there is no sentencepiece.model beside it; give the "
                "SentencePiece model that the data was prepared with, or token ids"
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
        """Return token ids `[L]` as a text, the opposite of `tokenize` up to white space."""
        tokenizer = self._tokenizer or Words()
        lines: list[list[str]] = [[]]
        for token in map(int, tokens):
            if token == self.dictionary.eos():
                lines.append([])
            else:
                lines[-1].append(self.dictionary[token])
        return "\n".join(tokenizer.decode(line) for line in lines)

    def read(self, text: Text) -> Tensor:
        """Return what the model reads of a text: int64 `[1, L + 1]`, the start symbol first, on the model's device."""
        tokens = self.tokenize(text) if isinstance(text, str) else torch.as_tensor(text)
        if tokens.dim() != 1 or not len(tokens):
            what = "the text has no token" if tokens.dim() == 1 else f"token ids of shape {tuple(tokens.shape)}"
            raise UserError(f"{what}; give some text, or token ids of shape [L]")
        if tokens.dtype.is_floating_point or not 0 <= int(tokens.min()) <= int(tokens.max()) < len(self.dictionary):
            raise UserError(f"the token ids are not all integers from 0 to {len(self.dictionary) - 1}; see tokenize")
        if len(tokens) > self.max_tokens:
            raise UserError(
                f"the text has {len(tokens):,} tokens, the model reads {self.max_tokens:,} at once; give less"
            )
        return torch.cat([torch.tensor([self.start]), tokens.cpu().long()]).unsqueeze(0).to(self.device)

    @property
    def start(self) -> int:
        """The id of the symbol that every text is read behind."""
        has_begin = getattr(self.task.args, "add_bos_token", False)
        return self.dictionary.bos() if has_begin else self.dictionary.eos()

    @torch.no_grad()
    def logits(self, text: Text) -> Tensor:
        """Return the logits of each next token: fp32 `[L + 1, V]`, on the model's device.

        Row i is of the token at position i + 1: the first row predicts the first token, the last row what follows.

        Raises:
            UserError: for a model with an adaptive softmax, which has none.
        """
        if getattr(self.model.decoder, "adaptive_softmax", None) is not None:
            raise UserError("a model with an adaptive softmax has no logits; use log_probabilities")
        return self.model(self.read(text))[0][0].float()

    @torch.no_grad()
    def log_probabilities(self, text: Text) -> Tensor:
        """Return the log-probabilities of each next token, in nats: fp32 `[L + 1, V]`, rows as those of `logits`."""
        output = self.model(self.read(text))
        return self.model.get_normalized_probs(output, log_probs=True)[0].float()

    def next_token_probabilities(self, text: Text, top: int = 10) -> pd.DataFrame:
        """Return the most probable tokens to follow a text, most probable first.

        Args:
            text: what is before.
            top: how many, 1 to V.

        Returns:
            Columns `token` (str), `id` (int) and `probability` (float).

        Raises:
            UserError: for another `top`, and for `--hash-feature future`, which sees the token that it predicts.
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
            token's K experts, or of MultiHash's segments), `expert` (int), `weight` (float, what the expert's output is
            scaled by) and `dropped` (bool: the expert was over its capacity, and did not serve it). No rows for a dense
            model.
        """
        return route(self.model, self.read(text), self.dictionary)

    def routes_read(self, read: Tensor, position: int = 0) -> pd.DataFrame:
        """Return `routes` of a block of a longer text: token ids `[L]` as they are read, without a start symbol.

        Args:
            read: int64 `[L]`, 1 to `max_tokens` + 1 ids.
            position: of the first one in the text.
        """
        table = route(self.model, read.unsqueeze(0).to(self.device), self.dictionary)
        table["position"] += position
        return table

    def sample(self, text: "Text | None" = None, sampling: "Sampling | None" = None, **options: Any) -> list[Sample]:
        """Go on from a text, or from the start of a line, by fairseq's generator.

        Args:
            text: one line; None begins a line.
            sampling: how, or the fields of `Sampling` by name: `length`, `number`, `temperature`, `top_k`, `top_p`,
                `beam`, `seed`.

        Returns:
            Samples, by descending probability; each ends at its length or at a line's end.

        Raises:
            UserError: for options out of range or that do not go together, a text of several lines, and
                `--hash-feature future`.
        """
        self._require_no_oracle()
        sampling = Sampling(**options) if sampling is None else sampling
        read = torch.tensor([[self.start]], device=self.device) if text is None else self.read(text)
        return sample(self.model, self.task, read, sampling, self.detokenize)

    def _require_no_oracle(self) -> None:
        if state_of(self.model).is_oracle:
            raise UserError("--hash-feature future sees the token that it is to predict; such a model predicts no text")
