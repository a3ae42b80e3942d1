"""Which experts share a rank: a placement by the experts' loads, and a bound that no placement can beat.

Every rank of a group holds E / P experts, and a layer's exchange waits for the rank with the most rows. So what counts
is the largest rank's load, added up over the layers: each of them waits on its own. A placement holds for all layers.

To split numbers into parts of equal sum and equal size is NP-hard. Here the largest expert goes first, to the rank with
the least load that has room (Graham's LPT rule), and then experts of the fullest ranks change places with others as
long as that helps. `lower_bound` says how much better any placement could be.

Shape suffixes: see `moe.losses`; L is the number of layers, P that of the ranks of a group.
"""

import numpy as np

CONTIGUOUS, BALANCED = "contiguous", "balanced"  # what `--expert-placement` has names for; else it is a file of loads
UNITS = 1 << 26  # a layer's loads, as whole numbers: sums are exact, so that every rank finds the same placement
MOST = np.iinfo(np.int64).max


def balanced_order(load_LE: np.ndarray, size: int) -> tuple[int, ...]:
    """Return the expert of each of E slots, of which each of `size` ranks has the next E / `size`.

    The experts of a rank stand in ascending order, and so do the ranks by their first experts. The result is the same
    on every machine.

    Args:
        load_LE: loads of the experts of each layer, 0 or more, in any unit; every layer has some.
        size: P, a divisor of E.
    """
    load_LE = np.rint(load_LE * (UNITS / load_LE.sum(axis=1, keepdims=True))).astype(np.int64)
    rank_E = _largest_first(load_LE.sum(axis=0), size)
    while (swap := _best_swap(load_LE, rank_E, size)) is not None:
        one, other = swap
        rank_E[[one, other]] = rank_E[[other, one]]
    held = sorted(np.flatnonzero(rank_E == rank).tolist() for rank in range(size))
    return tuple(expert for experts in held for expert in experts)


def rank_loads(load_E: np.ndarray, order: "tuple[int, ...] | None", size: int) -> np.ndarray:
    """Return the load of each rank, `[..., P]`, for loads of experts, `[..., E]`; no `order`: by ascending id."""
    slot_load_E = load_E if order is None else load_E[..., list(order)]
    return slot_load_E.reshape(*load_E.shape[:-1], size, -1).sum(axis=-1)


def lower_bound(load_E: np.ndarray, size: int) -> float:
    """Return a load that the fullest rank has in every placement of one layer.

    Proof. Let e = E / P be the number of experts of a rank, and c_1 >= c_2 >= ... the loads.

    1. The largest load of a rank is at least the mean.
    2. Take any m from 0 to e - 1 and the m P + 1 largest experts. By the pigeonhole principle some rank has m + 1 of
       them, so at least the m + 1 smallest among these. Its other e - m - 1 experts have at least the load of the
       e - m - 1 smallest of all.
    """
    experts = len(load_E) // size
    load_E = np.sort(load_E)[::-1].astype(float)
    bounds = [load_E.sum() / size]
    for shared in range(experts):  # m
        last = shared * size + 1
        bounds.append(load_E[last - shared - 1 : last].sum() + load_E[len(load_E) - (experts - shared - 1) :].sum())
    return max(bounds)


def _largest_first(load_E: np.ndarray, size: int) -> np.ndarray:
    """Return the rank of each expert: the largest go first, each to the rank with the least load that has room."""
    rank_E = np.empty(len(load_E), dtype=np.int64)
    load_P, room_P = np.zeros(size, dtype=np.int64), np.full(size, len(load_E) // size)
    for expert in np.argsort(-load_E, kind="stable"):
        rank = np.where(room_P > 0, load_P, MOST).argmin()
        rank_E[expert] = rank
        load_P[rank] += load_E[expert]
        room_P[rank] -= 1
    return rank_E


def _best_swap(load_LE: np.ndarray, rank_E: np.ndarray, size: int) -> "tuple[int, int] | None":
    """Return the two experts of different ranks whose swap helps most; None where none does.

    It helps if the sum over the layers of the largest rank's load falls; or if it stays, and the squares of the ranks'
    loads fall: where two ranks are equally full, one after the other becomes less so. Experts of the fullest rank of
    each layer are tried with all others.
    """
    load_LP = np.stack([np.bincount(rank_E, load_E, size) for load_E in load_LE]).astype(np.int64)
    best, swap = (int(load_LP.max(axis=1).sum()), 0), None
    for rank in np.unique(load_LP.argmax(axis=1)):
        ours, theirs = np.flatnonzero(rank_E == rank), np.flatnonzero(rank_E != rank)
        largest = np.zeros((len(ours), len(theirs)), dtype=np.int64)
        squares = np.zeros_like(largest)
        for load_E, load_P in zip(load_LE, load_LP, strict=True):
            moved = load_E[ours][:, None] - load_E[theirs]
            ours_load, their_load = load_P[rank], load_P[rank_E[theirs]]
            third_load = _largest_of_third(load_P, rank)[rank_E[theirs]]
            largest += np.maximum(third_load, np.maximum(ours_load - moved, their_load + moved))
            squares += moved * (moved - (ours_load - their_load))
        if not largest.size:  # one rank has all experts
            continue
        least = largest.min()
        squares[largest > least] = MOST
        one, other = np.unravel_index(squares.argmin(), squares.shape)
        if (found := (int(least), int(squares[one, other]))) < best:
            best, swap = found, (int(ours[one]), int(theirs[other]))
    return swap


def _largest_of_third(load_P: np.ndarray, rank: int) -> np.ndarray:
    """Return for each other rank, `[P]`, the largest load of a rank that is neither it nor `rank`; 0 without one."""
    others_P = np.delete(load_P, rank)
    if len(others_P) < 2:
        return np.zeros_like(load_P)
    second, first = np.sort(others_P)[-2:]
    largest_P = np.full_like(load_P, first)
    if (others_P == first).sum() == 1:
        largest_P[(load_P == first) & (np.arange(len(load_P)) != rank)] = second
    return largest_P
