"""Every builder of hash tables, and counts to build from."""

import numpy as np
from hypothesis import strategies as st

from fairseq_hash.hashing.builders import (
    balanced_experts,
    modulo_experts,
    random_experts,
    round_robin_experts,
    scattered_experts,
)
from fairseq_hash.hashing.clusters import dispersed_experts

experts_and_columns = st.integers(1, 12).flatmap(lambda experts: st.tuples(st.just(experts), st.integers(1, experts)))


def zipf(size, tokens=10**8, exponent=1.0, flat=2.7):
    """Counts of a vocabulary whose frequencies follow Zipf's law, Mandelbrot's `flat` ranks at its head."""
    share = 1 / (np.arange(size) + flat) ** exponent
    return (tokens * share / share.sum()).astype(np.int64) + 1


def every_builder(counts, num_experts, columns, seed):
    """A table of each builder."""
    size = len(counts)
    clusters = [key * key % 5 for key in range(size)]
    yield "balanced", balanced_experts(counts, num_experts, columns)
    yield "balanced with a seed", balanced_experts(counts, num_experts, columns, seed)
    yield "scattered", scattered_experts(counts, num_experts, columns, seed)
    yield "random", random_experts(size, num_experts, columns, seed)
    yield "modulo", modulo_experts(size, num_experts, columns)
    yield "round-robin", round_robin_experts(size, num_experts, columns)
    yield "dispersed", dispersed_experts(clusters, counts, num_experts, columns)
