"""Every form of hash layer, as options of a model."""

from dataclasses import replace

import numpy as np
from plugin import build

from fairseq_hash import hashing
from fairseq_hash.hashing.words import word_index

HASH = ("--router", "hash", "--sparse-layers", "0,1", "--num-experts", "4", "--hash-table", "random")
K3 = ("--experts-per-token", "3")
VARIANTS = {
    "token": (),
    "previous": ("--hash-feature", "previous"),
    "bigram": ("--hash-feature", "bigram", "--hash-buckets", "97"),
    "ngram": ("--hash-feature", "ngram", "--hash-length", "3"),
    "history": ("--hash-feature", "history", "--hash-length", "2"),
    "position": ("--hash-feature", "position"),
    "multi-hash": ("--multi-hash", "4"),
    "scattered": (*K3, "--hash-table", "scattered", "--hash-per-layer"),
    "uniform": (*K3,),
    "learned": (*K3, "--hash-weights", "learned", "--hash-score", "sqrt-softplus", "--hash-scale", "2.5"),
    "shared": ("--shared-expert",),
    "swiglu": ("--expert-form", "swiglu", "--swiglu-limit", "1", "--shared-expert", *K3),
    "per-layer": ("--hash-per-layer",),
    "per-layer multi-hash": ("--hash-per-layer", "--hash-table", "balanced", "--multi-hash", "2"),
    "hash and switch": ("--router", "hash,switch"),
}


def words_of(variant, data, tmp_path):
    """Return the options of a variant; `spread` and `word` need table files."""
    if variant in VARIANTS:
        return (*HASH, *VARIANTS[variant])
    _, task, _, _ = build(data)
    symbols, counts = task.source_dictionary.symbols, task.source_dictionary.count
    base = hashing.build_table("balanced", symbols, counts, hashing.TableShape(4, 2), 0)
    generator = np.random.default_rng(3)
    if variant == "spread":
        heavy = np.arange(len(symbols)) % 3 == 0
        pair = (np.flatnonzero(heavy)[:, None] * len(symbols) + np.arange(0, len(symbols), 2)).ravel()
        index = {"heavy": heavy, "pair": pair}
    else:
        pieces = [f"{'▁' if place % 2 else ''}{'abc'[place % 3]}" for place in range(len(symbols))]
        index = word_index(pieces, ["▁ab", "▁abc", "▁ca", "▁b", "▁cbac"])
    more = len(index["pair"] if variant == "spread" else index["word_hash"])
    expert_HK = np.concatenate([base.expert_HK, generator.random((more, 4)).argsort(axis=1)[:, :2]])
    record = replace(base.record, feature="word" if variant == "word" else "token")
    hashing.save_table(hashing.HashTable(expert_HK, record, index), tmp_path / "table")
    feature = ("--hash-feature", "word") if variant == "word" else ()
    return (*HASH, "--experts-per-token", "2", "--hash-table", tmp_path / "table", *feature)
