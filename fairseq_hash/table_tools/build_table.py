"""A table built as the command line says, from dictionary, counts, text or embeddings. Shape suffixes: `moe.losses`."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Optional

import numpy as np

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing import Feature, HashTable, TableShape
from fairseq_hash.hashing.build import deal_out, record_of
from fairseq_hash.hashing.builders import best_of, equal_count
from fairseq_hash.hashing.dictionary import SPECIAL, read_dictionary, token_counts
from fairseq_hash.hashing.features import OF_TOKENS
from fairseq_hash.hashing.registry import OF_COUNTS, OF_EMBEDDINGS, REGISTRY, Keys
from fairseq_hash.hashing.spread import heavy_tokens, spread_table
from fairseq_hash.hashing.table import check_table_size
from fairseq_hash.hashing.words import word_index
from fairseq_hash.table_tools.build_options import BUCKETS, Options, check, own_names
from fairseq_hash.table_tools.count_keys import count_keys, count_pairs
from fairseq_hash.table_tools.token_streams import Text, open_text


@dataclass(frozen=True, eq=False)
class Built:
    """A table, the counts of its rows (int64 `[H]`; None if they are not known), and the source of these counts."""

    table: HashTable
    count_H: Optional[np.ndarray]
    source: str


def build(options: Options, say: Callable[[str], object] = print) -> Built:
    """Build a table.

    `say` gets further lines for the user. Raises `UserError` for bad input, in one line.
    """
    check(options)
    feature = Feature(options.feature, options.length)
    symbols, listed = read_dictionary(options.dictionary)
    index: dict[str, np.ndarray] = {}
    num_keys = len(symbols)
    if feature.name == "word":
        words = read_dictionary(options.words)[0][len(SPECIAL) :]
        with own_names():
            index = word_index(symbols, words)
        num_keys += len(index["word_hash"])
    elif feature.name not in OF_TOKENS:
        num_keys = options.keys or (options.tokens_per_sample if feature.name == "position" else BUCKETS)
    check_table_size(num_keys, options.columns, options.num_experts)
    text = open_text(options.text, options.subset, symbols) if options.text else None
    embedding_VD = None
    if options.embeddings:
        from fairseq_hash.table_tools.embeddings import read_embeddings  # other tables are built without torch

        embedding_VD, is_known = read_embeddings(options.embeddings, symbols)
        if not is_known:
            say(f"note: {options.embeddings} does not name its dictionary; only the number of its symbols was checked")
    if feature.is_oracle:
        say("note: --feature future is an oracle: it sees the token that the model is to predict")
    count_H, source = _counts(options, symbols, listed, feature, num_keys, index, text, say)
    if options.builder in OF_COUNTS and (count_H is None or count_H.max() <= 1):
        raise UserError(
            f"{source} has no token counts (none is above 1), and --builder {options.builder} needs them; "
            "use a dict.txt that fairseq-preprocess made from the training text, --counts, --text, or --builder random"
        )
    if options.builder in OF_COUNTS and text is None and (count := equal_count(count_H)):
        raise UserError(
            f"{source} counts every symbol {count:,} times, which no text does, and --builder {options.builder} "
            "balances by counts; count the training text (--text DATA), or use --builder random"
        )
    shape = TableShape(options.num_experts, options.columns, options.is_multi_hash, feature)
    expert_HK, settings = _experts(options, shape, Keys(num_keys, count_H, embedding_VD, options.clusters))
    if text is not None and options.tokens_per_sample:
        settings["tokens_per_sample"] = options.tokens_per_sample
    uses_counts = options.builder in OF_COUNTS or options.restarts > 1
    if uses_counts:
        settings["counts"] = source
    is_drawn = REGISTRY[options.table_builder].is_drawn or options.is_multi_hash or options.restarts > 1
    seed, seen_H = options.seed if is_drawn else None, count_H if uses_counts else None
    # The record of a spread table names this builder as its base.
    record = record_of(options.table_builder, symbols, shape, seed, seen_H, settings)
    table = HashTable(expert_HK, record, index)
    if options.builder == "spread":
        pairs = count_pairs(
            text, heavy_tokens(count_H, options.num_experts, options.columns), options.tokens_per_sample
        )
        spread = spread_table(table, count_H, pairs)
        table = replace(spread, record=replace(spread.record, settings=record.settings | spread.record.settings))
        count_H = count_keys(feature, len(table.expert_HK), table.index, text, options.tokens_per_sample)
    return Built(table, count_H, source)


def _counts(
    options: Options,
    symbols: list[str],
    listed: list[int],
    feature: Feature,
    num_keys: int,
    index: dict[str, np.ndarray],
    text: "Text | None",
    say: Callable[[str], object],
) -> tuple["np.ndarray | None", str]:
    """Return the counts of the keys, int64 `[H]`, or None if they are not known; and their source."""
    if text is not None:
        count_H = count_keys(feature, num_keys, index, text, options.tokens_per_sample)
        text.say_unknown(say)
        return count_H, f"text {options.text.name}"
    if feature.name not in OF_TOKENS:
        return None, "nothing"
    return token_counts(options.counts, options.dictionary, symbols, listed, say)


def _experts(options: Options, shape: TableShape, keys: Keys) -> tuple[np.ndarray, dict[str, Any]]:
    """Return experts, int64 `[H, K]`, and the settings to record; for a spread table those of its single tokens."""

    def draw(restart: int) -> np.ndarray:
        # The first table is the one that a model builds by itself with these options.
        return deal_out(options.table_builder, keys, shape, options.seed, restart)

    if options.restarts > 1:
        if keys.count_H is None:
            raise UserError(f"--restarts {options.restarts}: nothing says which table is best; give a --text")
        expert_HK, best = best_of(options.restarts, draw, keys.count_H, shape.num_experts)
        return expert_HK, {"restarts": options.restarts, "best_restart": best}
    settings: dict[str, Any] = {}
    if options.builder in OF_EMBEDDINGS:
        digest = hashlib.sha256(keys.embedding_HD.contiguous().numpy().tobytes()).hexdigest()
        settings = {"embeddings": options.embeddings.name, "embeddings_fingerprint": digest}
    if options.builder == "dispersed":
        settings["clusters"] = options.clusters or min(shape.num_experts, keys.number)
    return draw(0), settings
