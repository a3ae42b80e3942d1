"""Which experts share a rank: a placement by the experts' loads, and a bound that no placement can beat.

Every rank of a group holds E / P experts, and a layer's exchange waits for the rank with the most rows. So what counts
is the largest rank's load, added up over the layers: each of them waits on its own. A placement holds for all layers.

To split numbers into parts of equal sum and equal size is NP-hard. Here the largest expert goes first, to the rank with
the least load that has room (Graham's LPT rule), and then experts of the fullest ranks change places with others as
long as that helps. `lower_bound` says how much better any placement could be.

Where there is room for replicas, each one in turn goes to the expert of which a copy has the most rows. Copies have
equal parts of their expert's rows, and slots of their own on different ranks.

Shape suffixes: see `moe.losses`; L is the number of layers, P that of the ranks of a group, S that of their slots.
"""

import numpy as np

CONTIGUOUS, BALANCED = "contiguous", "balanced"  # what `--expert-placement` has names for; else it is a file of loads
UNITS = 1 << 26  # a layer's loads, as whole numbers: sums are exact, so that every rank finds the same placement
MOST = np.iinfo(np.int64).max


def balanced_order(load_LE: np.ndarray, size: int, replicas: int = 0) -> tuple[int, ...]:
    """Return the expert of each of S slots, E and as many as there are replicas; each rank has the next S / P.

    The experts of a rank stand in ascending order, each once, and so do the ranks by their experts. The result is the
    same on every machine.

    Args:
        load_LE: loads of the experts of each layer, 0 or more, in any unit; every layer has some.
        size: P, a divisor of E.
        replicas: a multiple of P; at most E (P - 1), where every rank has all experts.
    """
    load_LE = np.rint(load_LE * (UNITS / load_LE.sum(axis=1, keepdims=True))).astype(np.int64)
    copies_E = copies_of_experts(load_LE.sum(axis=0), size, replicas)
    expert_S = np.repeat(np.arange(len(copies_E)), copies_E)
    load_LS = load_LE[:, expert_S] // copies_E[expert_S]
    rank_S = _largest_first(load_LS.sum(axis=0), expert_S, size)
    while (swap := _best_swap(load_LS, expert_S, rank_S, size)) is not None:
        one, other = swap
        rank_S[[one, other]] = rank_S[[other, one]]
    held = sorted(expert_S[rank_S == rank].tolist() for rank in range(size))
    return tuple(expert for experts in held for expert in experts)


def copies_of_experts(load_E: np.ndarray, size: int, replicas: int) -> np.ndarray:
    """Return how many copies each expert has, int64 `[E]`, 1 to P: the largest load of a copy is as small as can be."""
    copies_E = np.ones(len(load_E), dtype=np.int64)
    for _ in range(replicas):
        copies_E[np.where(copies_E < size, load_E / copies_E, -1.0).argmax()] += 1
    return copies_E


def rank_loads(load_E: np.ndarray, order: "tuple[int, ...] | None", size: int) -> np.ndarray:
    """Return the load of each rank, `[..., P]`, for loads of experts, `[..., E]`; no `order`: by ascending id.

    Copies of an expert have equal parts of its load.
    """
    slot_load_S = load_E
    if order is not None:
        slot_load_S = load_E[..., list(order)]
        if len(order) > load_E.shape[-1]:
            slot_load_S = slot_load_S / np.bincount(order)[list(order)]
    return slot_load_S.reshape(*load_E.shape[:-1], size, -1).sum(axis=-1)


def lower_bound(load_E: np.ndarray, size: int, replicas: int = 0) -> float:
    """Return a load that the fullest rank has in every placement of one layer with so many replicas.

    With replicas it is the mean, or the load of the largest copy, however copies are given to experts. Proof without
    replicas. Let e = E / P be the number of experts of a rank, and c_1 >= c_2 >= ... the loads.

    1. The largest load of a rank is at least the mean.
    2. Take any m from 0 to e - 1 and the m P + 1 largest experts. By the pigeonhole principle some rank has m + 1 of
       them, so at least the m + 1 smallest among these. Its other e - m - 1 experts have at least the load of the
       e - m - 1 smallest of all.
    """
    if replicas:
        return float(max(load_E.sum() / size, (load_E / copies_of_experts(load_E, size, replicas)).max()))
    experts = len(load_E) // size
    load_E = np.sort(load_E)[::-1].astype(float)
    bounds = [load_E.sum() / size]
    for shared in range(experts):  # m
        last = shared * size + 1
        bounds.append(load_E[last - shared - 1 : last].sum() + load_E[len(load_E) - (experts - shared - 1) :].sum())
    return max(bounds)


def _largest_first(load_S: np.ndarray, expert_S: np.ndarray, size: int) -> np.ndarray:
    """Return the rank of each slot: the largest go first, each to the rank with the least load that has room.

    A rank has no room for an expert that it holds already.
    """
    rank_S = np.full(len(load_S), -1)
    load_P, room_P = np.zeros(size, dtype=np.int64), np.full(size, len(load_S) // size)
    holds_PE = np.zeros((size, expert_S.max() + 1), dtype=bool)

    def put(slot: np.integer, rank: np.integer) -> None:
        rank_S[slot] = rank
        load_P[rank] += load_S[slot]
        room_P[rank] -= 1
        holds_PE[rank, expert_S[slot]] = True

    for slot in np.argsort(-load_S, kind="stable"):
        fits_P = (room_P > 0) & ~holds_PE[:, expert_S[slot]]
        if fits_P.any():
            put(slot, np.where(fits_P, load_P, MOST).argmin())
            continue
        # Every rank with room has this expert. A full one without it makes room: of its experts, which are more than
        # those of a rank with room, that rank lacks one.
        full = np.where(holds_PE[:, expert_S[slot]], MOST, load_P).argmin()
        free = np.where(room_P > 0, load_P, MOST).argmin()
        moved = next(one for one in np.flatnonzero(rank_S == full) if not holds_PE[free, expert_S[one]])
        load_P[full] -= load_S[moved]
        room_P[full] += 1
        holds_PE[full, expert_S[moved]] = False
        put(moved, free)
        put(slot, full)
    return rank_S


def _best_swap(load_LS: np.ndarray, expert_S: np.ndarray, rank_S: np.ndarray, size: int) -> "tuple[int, int] | None":
    """Return the two slots of different ranks whose swap helps most; None where none does.

    It helps if the sum over the layers of the largest rank's load falls; or if it stays, and the squares of the ranks'
    loads fall: where two ranks are equally full, one after the other becomes less so. Experts of the fullest rank of
    each layer are tried with all others. No rank gets a second copy of an expert.
    """
    holds_PE = np.zeros((size, expert_S.max() + 1), dtype=bool)
    holds_PE[rank_S, expert_S] = True
    load_LP = np.stack([np.bincount(rank_S, load_S, size) for load_S in load_LS]).astype(np.int64)
    best, swap = (int(load_LP.max(axis=1).sum()), 0), None
    for rank in np.unique(load_LP.argmax(axis=1)):
        ours, theirs = np.flatnonzero(rank_S == rank), np.flatnonzero(rank_S != rank)
        largest = np.zeros((len(ours), len(theirs)), dtype=np.int64)
        squares = np.zeros_like(largest)
        for load_S, load_P in zip(load_LS, load_LP, strict=True):
            moved = load_S[ours][:, None] - load_S[theirs]
            ours_load, their_load = load_P[rank], load_P[rank_S[theirs]]
            third_load = _largest_of_third(load_P, rank)[rank_S[theirs]]
            largest += np.maximum(third_load, np.maximum(ours_load - moved, their_load + moved))
            squares += moved * (moved - (ours_load - their_load))
        if not largest.size:  # one rank has all experts
            continue
        largest[holds_PE[rank_S[theirs]][:, expert_S[ours]].T | holds_PE[rank, expert_S[theirs]]] = MOST
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
