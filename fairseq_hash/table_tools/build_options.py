"""The options of `fairseq-hash tables build`, and which of them go together."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.options import flag_of, option
from fairseq_hash.core.validators import check_at_least, refuse
from fairseq_hash.hashing import Feature
from fairseq_hash.hashing.features import FEATURES, OF_BUCKETS, OF_TOKENS
from fairseq_hash.hashing.registry import BASES, OF_COUNTS, OF_EMBEDDINGS, REGISTRY, VARYING

BUCKETS = 262144


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `tables build`."""

    dictionary: Path
    builder: str = option("balanced", "builder of the table (default: balanced)", choices=REGISTRY)
    num_experts: int = option(help="number of experts, 1 or more", metavar="E")
    experts_per_token: int = option(1, "distinct experts per token (default: 1)", metavar="K")
    multi_hash: int = option(1, "number of hash functions, one for each segment of the experts' width", metavar="N")
    seed: int = option(42, "random seed, 0 or more (default: 42)")
    restarts: int = option(1, "build R tables and keep the best (default: 1)", metavar="R")
    feature: str = option("token", "the key of a token, which is hashed (default: token)", choices=FEATURES)
    length: int = option(0, "tokens of ngram (2 or more) and history (1 or more)", metavar="N")
    keys: Optional[int] = option(None, f"rows of a table of buckets (default: {BUCKETS}) or positions", metavar="H")
    words: Optional[Path] = option(None, "for --feature word: dict.txt of the larger dictionary", metavar="DICT")
    counts: Optional[Path] = option(None, "lines `symbol count`, instead of the dictionary's counts", metavar="FILE")
    text: Optional[Path] = option(
        None, "count keys in a file of symbols, a binarized text or a data folder", metavar="PATH"
    )
    subset: str = option("train", "subset of --text, if it is a data folder (default: train)")
    tokens_per_sample: int = option(
        0, "cut texts into samples of N tokens, as training does (default: do not); needed for positions", metavar="N"
    )
    embeddings: Optional[Path] = option(None, "for clusters and dispersed: a trained checkpoint", metavar="CKPT")
    base: Optional[str] = option(
        None, "for spread: builder of the table of single tokens (default: balanced)", choices=BASES
    )
    clusters: Optional[int] = option(
        None, "for dispersed: number of clusters (default: as many as experts)", metavar="C"
    )

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
    least = dict.fromkeys(("num_experts", "experts_per_token", "restarts", "keys", "clusters", "multi_hash"), 1)
    for name, low in {**least, "seed": 0, "tokens_per_sample": 0}.items():
        value = getattr(options, name)
        if value is not None:
            check_at_least(flag_of(name), value, low)
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
    refuse(refusals)


@contextmanager
def own_names() -> Iterator[None]:
    """Name options in errors as they are called here: a model's --hash-feature is --feature here."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("--hash-", "--")) from None
