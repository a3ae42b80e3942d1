"""Every builder of tables by its name, and what it needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fairseq_hash.hashing.builders import (
    balanced_experts,
    modulo_experts,
    random_experts,
    round_robin_experts,
    scattered_experts,
)
from fairseq_hash.hashing.clusters import cluster_keys, clustered_experts, dispersed_experts


@dataclass(frozen=True, eq=False)
class Keys:
    """H keys, a table's rows, and what is known of them.

    Attributes:
        number: H.
        count_H: int64 `[H]`, how often each occurs in the training text.
        embedding_HD: floating point `[H, D]`, of a trained model.
        clusters: of the embeddings, for builders that group keys first; None for as many as experts.
    """

    number: int
    count_H: Any = None  # each builder says what it needs, and has it
    embedding_HD: Any = None
    clusters: "int | None" = None


@dataclass(frozen=True)
class Builder:
    """A way to deal the experts out.

    Attributes:
        build: makes experts, int64 `[H, K]`, of keys, E, K and a seed (None: the table that needs no seed).
        needs: which it needs of "counts", "embeddings" and "text". A model has counts only.
        is_drawn: whether even its first table is drawn by the seed.
        varies: whether another seed makes another table as good, for hash functions that differ and for restarts.
    """

    build: Callable[..., np.ndarray]
    needs: tuple[str, ...] = ()
    is_drawn: bool = False
    varies: bool = False


def _dispersed(keys: Keys, num_experts: int, columns: int, seed: int) -> np.ndarray:
    cluster_H, _ = cluster_keys(keys.embedding_HD, keys.clusters or min(num_experts, keys.number), seed)
    return dispersed_experts(cluster_H, keys.count_H, num_experts, columns)


def _of_a_table(*_: object) -> np.ndarray:
    raise NotImplementedError("spread tables are made of a table of single tokens")


REGISTRY = {
    "balanced": Builder(lambda keys, *rest: balanced_experts(keys.count_H, *rest), ("counts",), varies=True),
    "scattered": Builder(lambda keys, *rest: scattered_experts(keys.count_H, *rest), ("counts",), True, True),
    "random": Builder(lambda keys, *rest: random_experts(keys.number, *rest), (), True, True),
    "modulo": Builder(lambda keys, E, K, _: modulo_experts(keys.number, E, K)),
    "round-robin": Builder(lambda keys, E, K, _: round_robin_experts(keys.number, E, K)),
    "clusters": Builder(lambda keys, *rest: clustered_experts(keys.embedding_HD, *rest), ("embeddings",), True),
    "dispersed": Builder(_dispersed, ("counts", "embeddings"), True),
    # Made of a table of single tokens (`spread.spread_table`), one of `BASES`.
    "spread": Builder(_of_a_table, ("counts", "text")),
}
BASES = ("balanced", "scattered")


def that_need(what: str) -> tuple[str, ...]:
    """Return the names of the builders that need "counts", "embeddings" or "text"."""
    return tuple(name for name, builder in REGISTRY.items() if what in builder.needs)


OF_COUNTS, OF_EMBEDDINGS = that_need("counts"), that_need("embeddings")
VARYING = tuple(name for name, builder in REGISTRY.items() if builder.varies)
# Those that a model builds for itself, and which of them are drawn.
BUILDERS = tuple(name for name, builder in REGISTRY.items() if {"counts"}.issuperset(builder.needs))
DRAWN = tuple(name for name in BUILDERS if REGISTRY[name].is_drawn)
