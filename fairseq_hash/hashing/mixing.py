"""SplitMix64 (Steele, Lea, Flood 2014): the only source of pseudo-random numbers for hash tables.

It depends on no generator and no version of a library. It gives the same numbers on every machine: here in NumPy, and
in `lookup` in torch, on a GPU too.
"""

from collections.abc import Sequence

import numpy as np

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

Integers = Sequence[int] | np.ndarray  # whole numbers, such as counts


def mix(key: np.ndarray) -> np.ndarray:
    """Mix 64-bit keys (uint64, any shape); unsigned arithmetic wraps by definition."""
    with np.errstate(over="ignore"):
        key = key + np.uint64(GOLDEN)
        key = (key ^ (key >> np.uint64(30))) * np.uint64(FIRST)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(SECOND)
        return key ^ (key >> np.uint64(31))


def draws(seed: int, size: int, stream: int = 0) -> np.ndarray:
    """Return `size` pseudo-random uint64. Another seed or stream (0 or more) gives other numbers."""
    key = np.arange(size, dtype=np.uint64) + (np.uint64(seed % 2**64) << np.uint64(32))
    drawn = mix(mix(key))
    for _ in range(stream):
        drawn = mix(drawn)
    return drawn
