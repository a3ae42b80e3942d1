"""Options of hash layers: features, tables, several experts per token. `sparse_options` has the other options."""

from dataclasses import dataclass

from fairseq.dataclass import FairseqDataclass

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.options import option
from fairseq_hash.core.validators import check_at_least, check_one_of
from fairseq_hash.hashing import Feature, TableShape
from fairseq_hash.hashing.features import FEATURES, OF_BUCKETS
from fairseq_hash.hashing.registry import BUILDERS, DRAWN
from fairseq_hash.moe.hash_weights import SCORES

WEIGHTS = ("uniform", "learned")


@dataclass
class HashOptions(FairseqDataclass):
    """The options of the hash layers of a model. `check_hash` raises `UserError` for a value out of range."""

    hash_table: str = option(
        "balanced",
        "balanced or scattered (by the counts in the dictionary; scattered for several experts per token), "
        f"{', '.join(BUILDERS[2:])}, or the path of a table file; one for all layers with --router hash, or one for "
        "each, comma separated",
    )
    hash_seed: int = option(42, "seed of random tables, 0 or more")
    hash_count_eos: bool = option(
        False,
        "for --hash-table balanced and scattered: count </s> once for each line of the binarized train; dict.txt does "
        "not count it, and balanced tables take its count as 1",
    )
    hash_per_layer: bool = option(
        False,
        "give each hash layer a table of its own, with another seed; for --hash-table balanced, scattered or random",
    )
    hash_feature: str = option(
        "token",
        f"what is hashed: {', '.join(FEATURES)}; future is an oracle, for analysis; predicted needs --hash-predictor; "
        "word needs a table file",
    )
    hash_length: int = option(
        0,
        "number of tokens of --hash-feature ngram (the last ones, this one included) or history (those before this "
        "one)",
    )
    hash_buckets: int = option(
        262144, "number of rows of a table over --hash-feature bigram, ngram or history, 1 or more"
    )
    hash_predictor: str = option(
        "",
        "checkpoint of a language model with the same dictionary; --hash-feature predicted hashes its most probable "
        "next token",
    )
    multi_hash: int = option(
        1,
        "number of hash functions, each of which picks the expert of one segment of the FFN's hidden layer, 1 or "
        "more; parameters and FLOPs are those of 1",
    )
    experts_per_token: int = option(
        1, "number of experts of each token, 1 to --num-experts: those that the table gives, or --router topk chooses"
    )
    hash_weights: str = option(
        "uniform",
        "weights of the outputs of a token's experts: uniform (their mean) or learned (scores of the activation, "
        "normalised over these experts)",
    )
    hash_score: str = option("softmax", f"score function of --hash-weights learned: {', '.join(SCORES)}")
    hash_scale: float = option(
        1.0,
        "sum of the weights of a token's experts, more than 0 (2.5 in DeepSeek-V4); with one expert per token, or with "
        "--multi-hash, what multiplies the output",
    )

    @property
    def has_table_per_layer(self) -> bool:
        """Whether each hash layer has a table of its own."""
        return self.hash_per_layer or "," in self.hash_table

    @property
    def feature(self) -> Feature:
        """The feature that is hashed. Raises `UserError` if there is no such feature."""
        return Feature(self.hash_feature, self.hash_length)

    def table_shape(self, num_experts: int, positions: int) -> TableShape:
        """Return the shape that a table must have, for sequences of at most `positions` tokens."""
        is_multi_hash = self.multi_hash > 1
        return TableShape(
            num_experts,
            self.multi_hash if is_multi_hash else self.experts_per_token,
            is_multi_hash,
            self.feature,
            self.hash_buckets if self.hash_feature in OF_BUCKETS else positions,
        )

    def check_hash(self, num_experts: int) -> None:
        """Raise `UserError` for the first value that is out of its range, or does not go with another."""
        _ = self.feature
        check_one_of("--hash-weights", self.hash_weights, WEIGHTS)
        check_one_of("--hash-score", self.hash_score, SCORES)
        check_at_least("--hash-seed", self.hash_seed, 0)
        check_at_least("--hash-buckets", self.hash_buckets, 1)
        check_at_least("--multi-hash", self.multi_hash, 1)
        if not 1 <= self.experts_per_token <= num_experts:
            raise UserError(
                f"--experts-per-token {self.experts_per_token} is out of range; "
                f"give 1 to {num_experts}, the number of experts"
            )
        if not 0 < self.hash_scale < float("inf"):
            raise UserError(f"--hash-scale {self.hash_scale} is out of range; give a number above 0")
        if self.multi_hash > 1 and self.experts_per_token > 1:
            raise UserError(
                f"--multi-hash {self.multi_hash} and --experts-per-token {self.experts_per_token} do not go together; "
                "use one of them"
            )
        if (self.hash_feature == "predicted") != bool(self.hash_predictor):
            raise UserError("--hash-feature predicted and --hash-predictor go together; give both or none")
        if self.hash_per_layer and self.hash_table not in ("balanced", *DRAWN):
            raise UserError(
                f"--hash-per-layer draws tables for --hash-table balanced, {' or '.join(DRAWN)}, not "
                f"{self.hash_table}; give a table file for each hash layer instead, comma separated"
            )
