"""Features of a token, which say which row of a hash table is looked up.

Hash Layers (Roller et al. 2021), section 3.1. A feature sees a batch of token ids with padding. Beyond the ends of a
sequence, and at padding, there is "no token", with the id of padding. So the first token of a sequence has the same row
with and without padding before it. All features except `future` look only at the token and at what is before it. So a
prefix has the same rows as in the whole sequence, and generation step by step equals one pass.

Shape suffixes: see `moe.losses`; H is the number of keys, the rows of a table.
"""

from dataclasses import dataclass

from fairseq_hash.core.errors import UserError

FEATURES = ("token", "previous", "bigram", "ngram", "history", "position", "future", "predicted", "word")

# Features whose rows are token ids, and features whose rows are buckets of a hash.
OF_TOKENS = ("token", "previous", "future", "predicted")
OF_BUCKETS = ("bigram", "ngram", "history")
MOST_TOKENS = 64


@dataclass(frozen=True)
class Feature:
    """The key of a token: what is hashed.

    Attributes:
        name: one of `FEATURES`. token: the token itself. previous: the token before it. bigram: both. ngram: the last
            `length` tokens, it included. history: the `length` tokens before it, without it. Their rows are buckets:
            SplitMix64 of these tokens in their order, modulo the number of rows. position: the number of tokens before
            it in its sequence, modulo the number of rows. future: the token after it, an oracle: the very one that the
            model is to predict. predicted: the token that a trained model predicts to follow. word: the word of a
            larger dictionary that the token's piece completes (`words`).
        length: tokens of ngram (2 or more) and history (1 or more); 0 for all others.

    Raises:
        UserError: for another name, or a length that does not go with it.
    """

    name: str = "token"
    length: int = 0

    def __post_init__(self) -> None:
        if self.name not in FEATURES:
            raise UserError(f"--hash-feature {self.name} is unknown; use one of {', '.join(FEATURES)}")
        least = {"ngram": 2, "history": 1}.get(self.name)
        if least is None and self.length:
            raise UserError(
                f"--hash-length {self.length} goes with --hash-feature ngram or history; leave it out for {self.name}"
            )
        if least is not None and not least <= self.length <= MOST_TOKENS:
            raise UserError(
                f"--hash-length {self.length} does not go with --hash-feature {self.name}; "
                f"give {least} to {MOST_TOKENS} tokens"
            )

    @property
    def is_oracle(self) -> bool:
        """Whether it sees the token that the model must predict; a perplexity is then an oracle's."""
        return self.name == "future"

    def __str__(self) -> str:
        return f"{self.name} {self.length}" if self.length else self.name
