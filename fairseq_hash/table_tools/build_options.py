"""The options of `fairseq-hash tables build`, and which of them go together."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing import Feature
from fairseq_hash.hashing.features import OF_BUCKETS, OF_TOKENS
from fairseq_hash.hashing.registry import BASES, OF_COUNTS, OF_EMBEDDINGS, REGISTRY, VARYING

BUCKETS = 262144


@dataclass(frozen=True)
class Options:
    """The options of `tables build`, with the same names."""

    dictionary: Path
    num_experts: int
    builder: str = "balanced"
    experts_per_token: int = 1
    multi_hash: int = 1
    seed: int = 42
    restarts: int = 1
    feature: str = "token"
    length: int = 0
    keys: Optional[int] = None
    words: Optional[Path] = None
    counts: Optional[Path] = None
    text: Optional[Path] = None
    subset: str = "train"
    tokens_per_sample: int = 0
    embeddings: Optional[Path] = None
    clusters: Optional[int] = None
    base: Optional[str] = None

    @property
    def table_builder(self) -> str:
        """The builder that assigns the experts; for spread, the builder of the table of single tokens."""
        return self.base or BASES[0] if self.builder == "spread" else self.builder

    @property
    def columns(self) -> int:
        """Columns of the table."""
        return self.multi_hash if self.is_multi_hash else self.experts_per_token

    @property
    def is_multi_hash(self) -> bool:
        """Whether the columns are hash functions (MultiHash)."""
        return self.multi_hash > 1


def check(options: Options) -> None:
    """Raise `UserError` if options do not go together, before anything is read."""
    builder, feature = options.builder, options.feature
    least = {
        "num_experts": 1,
        "experts_per_token": 1,
        "seed": 0,
        "restarts": 1,
        "keys": 1,
        "clusters": 1,
        "multi_hash": 1,
    }
    for name, low in {**least, "tokens_per_sample": 0}.items():
        value = getattr(options, name)
        if value is not None and value < low:
            raise UserError(f"--{name.replace('_', '-')} {value} is out of range; give a number of {low} or more")
    with own_names():
        Feature(feature, options.length)
    refusals = {
        f"--experts-per-token {options.experts_per_token} exceeds --num-experts {options.num_experts}; the experts of "
        "a token are distinct: give fewer per token, or more experts": options.experts_per_token > options.num_experts,
        "--multi-hash and --experts-per-token exclude each other; leave one out": (
            options.is_multi_hash and options.experts_per_token > 1
        ),
        f"--multi-hash {options.multi_hash} needs a builder that can make different tables; use "
        f"{', '.join(VARYING)}, not {builder}": (options.is_multi_hash and builder not in VARYING),
        f"--restarts {options.restarts}: the builder {builder} makes one table only; leave it out": (
            options.restarts > 1 and not REGISTRY[options.table_builder].varies
        ),
        "--counts and --text both give the counts of tokens; leave one out": options.counts and options.text,
        f"--feature {feature} needs --words, the dict.txt of a larger dictionary": (
            feature == "word" and options.words is None
        ),
        f"--words goes with --feature word; leave it out for {feature}": options.words and feature != "word",
        f"--keys goes with features of buckets and positions; the number of rows for {feature} is fixed": (
            options.keys is not None and feature not in (*OF_BUCKETS, "position")
        ),
        "--feature position needs --keys, or --tokens-per-sample, which gives as many rows": (
            feature == "position" and not options.keys and not options.tokens_per_sample
        ),
        "--feature position needs --tokens-per-sample to be counted in a text, because it says where samples begin": (
            feature == "position" and options.text and not options.tokens_per_sample
        ),
        "--feature predicted cannot be counted in a text, because only a model predicts; leave --text out: the "
        "counts of tokens stand in for those of predictions": feature == "predicted" and options.text,
        f"--builder {builder} needs --text for --feature {feature}: the dictionary counts tokens only": (
            builder in OF_COUNTS and feature not in OF_TOKENS and not options.text
        ),
        f"--counts goes with features of tokens; count --feature {feature} in a --text": (
            options.counts and feature not in OF_TOKENS
        ),
        f"--builder {builder} is for features of tokens ({', '.join(OF_TOKENS)}), not {feature}": (
            builder in OF_EMBEDDINGS and feature not in OF_TOKENS
        ),
        f"--builder spread is for --feature token, not {feature}": builder == "spread" and feature != "token",
        "--builder spread needs --text to count pairs of tokens in": builder == "spread" and not options.text,
        f"--builder {builder} needs --embeddings, a trained checkpoint": (
            builder in OF_EMBEDDINGS and options.embeddings is None
        ),
        f"--embeddings goes with the builders {' and '.join(OF_EMBEDDINGS)}; leave it out for {builder}": (
            options.embeddings and builder not in OF_EMBEDDINGS
        ),
        f"--clusters goes with --builder dispersed; leave it out for {builder}": (
            options.clusters is not None and builder != "dispersed"
        ),
        f"--base goes with --builder spread; leave it out for {builder}": options.base and builder != "spread",
        f"--seed {options.seed} is out of range for k-means; give a number below 2^32": (
            builder in OF_EMBEDDINGS and options.seed >= 2**32
        ),
    }
    for message, is_wrong in refusals.items():
        if is_wrong:
            raise UserError(message)


@contextmanager
def own_names() -> Iterator[None]:
    """Name options in errors as they are called here: a model's --hash-feature is --feature here."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("--hash-", "--")) from None
