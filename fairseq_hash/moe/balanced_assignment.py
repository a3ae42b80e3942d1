"""Balanced assignment: give T tokens to E experts so that the total score is largest and loads differ by at most one.

The dual of this problem has one price for each expert: at the right prices every token takes the expert with the
largest score minus price, and all experts are equally sought after. So the work is over E numbers, not over tokens:

1. `equilibrium_prices` finds prices close to the right ones. It minimises the dual, smoothed by a temperature, with
   Newton's method, lowering the temperature from step to step; on the scores' device.
2. `Flow` lets every token take its favourite at these prices, and then moves the few that are too many along cheapest
   chains of experts (successive shortest paths). It is exact whatever the prices were; good ones make it short.

The result is an optimal assignment, up to the rounding of float64. Shape suffixes: see `losses`.
"""

import itertools
import math

import numpy as np
import torch
from torch import Tensor

COOLING = 0.3
"""Factor from one temperature to the next."""
MOST_STEPS, PATIENCE = 40, 4
"""Newton steps altogether, and in a row without better prices."""
HOST_SCORES = 2**18
"""Up to so many scores, prices are found on the host. Each Newton step waits for a GPU a few times; where processes
share it, each wait is for the work of the others, too. A process with a GPU to itself loses 2 ms by it: 8,192 x 32
scores take 7.6 ms on an H200, and 9.7 ms on 16 cores."""
LARGEST = 1e300
"""Of scores: sums and differences of two stay finite."""


def balanced_assignment(score_TE: Tensor) -> Tensor:
    """Return the experts (int64, `[T]`) of an assignment with the largest total score and loads that differ by <= 1.

    BASE Layers (Lewis et al. 2021), section 3.1, states the problem. The solver is described at the top of this file:
    Newton's method on the entropic dual, then successive shortest paths (Ahuja, Magnanti, Orlin, Network Flows, 1993,
    section 9.7) in a graph of the E experts. Equal scores give equal results on one kind of device; which of several
    optimal assignments is returned can differ between devices.

    Args:
        score_TE: floating, any T >= 0 and E >= 1.

    Raises:
        ValueError: where `score_TE` has another shape or type, or holds NaN or infinity.
    """
    check_scores(score_TE)
    score_TE = score_TE.double()
    host_TE = score_TE.cpu()
    prices_E = equilibrium_prices(host_TE if host_TE.numel() <= HOST_SCORES else score_TE)
    flow = Flow(host_TE.numpy(), prices_E.cpu().numpy())
    flow.balance()
    return torch.from_numpy(flow.expert_T).to(score_TE.device)


def check_scores(score_TE: Tensor) -> None:
    """Raise `ValueError` where scores have the wrong shape or type, or hold NaN or infinity."""
    if score_TE.dim() != 2 or score_TE.shape[1] == 0 or not score_TE.is_floating_point():
        raise ValueError(
            f"scores of {score_TE.dtype} with shape {tuple(score_TE.shape)}; give floating numbers [tokens, experts]"
        )
    # NaN compares as false. A fp64 limit: an infinity of any type is above it.
    if not (score_TE.double().abs() < LARGEST).all():
        wrong = "NaN" if score_TE.isnan().any() else "infinite"
        raise ValueError(f"a score for the balanced assignment is {wrong}; lower the learning rate or clip gradients")


def equilibrium_prices(score_TE: Tensor) -> Tensor:
    """Return prices (fp64, `[E]`) for fp64 scores, at which about as many tokens favour each expert as any other.

    Minimises sum over tokens of t * logsumexp((score - price) / t) + T / E * (sum of prices), whose gradient is the
    mean load minus the soft load, for falling temperatures t: a Newton step each, until only few tokens are too many or
    further steps do not help.
    """
    tokens, experts = score_TE.shape
    price_E = score_TE.new_zeros(experts)
    if tokens == 0 or experts == 1:
        return price_E
    # Only differences between a token's scores matter. In units of their mean they fit fp32, which is enough here.
    score_TE = score_TE - score_TE.amax(dim=1, keepdim=True)
    scale, mean_load = -score_TE.mean(), tokens / experts
    if scale == 0:
        return price_E
    score_TE, price_E = (score_TE / scale).float(), price_E.float()
    identity_EE = torch.eye(experts, device=score_TE.device)
    best_price_E, fewest, in_vain, temperature = price_E, tokens, 0, 1.0
    for _ in range(MOST_STEPS):
        share_TE = ((score_TE - price_E) / temperature).softmax(dim=1)
        surplus_E = share_TE.sum(dim=0) - mean_load
        hessian_EE = torch.diag(surplus_E + mean_load) - share_TE.t() @ share_TE
        # Prices are determined up to a constant, and an expert whose load is still zero has no curvature at all.
        hessian_EE += 1e-3 * mean_load * identity_EE
        # Where the dual is far from quadratic a Newton step overshoots; a few temperatures are as far as a share moves.
        price_E = price_E + temperature * torch.linalg.solve(hessian_EE, surplus_E).clamp(-4, 4)
        excess = _excess(score_TE - price_E, math.ceil(mean_load))
        in_vain += 1
        if excess < fewest:
            best_price_E, fewest, in_vain = price_E, excess, 0
        if fewest <= experts / 2 or in_vain == PATIENCE:
            break
        # Where loads are still far off, a lower temperature would freeze them.
        if surplus_E.abs().max() < mean_load:
            temperature *= COOLING
    return best_price_E * scale


def _excess(value_TE: Tensor, seats: int) -> int:
    """Return how many tokens are too many where each takes its most valuable expert."""
    load_E = torch.bincount(value_TE.argmax(dim=1), minlength=value_TE.shape[1])
    return int((load_E - seats).clamp(min=0).sum())


class Flow:
    """An assignment on its way to balance: always the best one for the loads that it has.

    An edge from expert i to expert j costs what is lost by moving the best-suited of i's tokens to j. Prices are kept
    such that no edge costs less than the price difference (reduced costs are never negative), so a cheapest chain from
    an expert with too many tokens to one with too few keeps the assignment the best one for its loads.

    T need not be a multiple of E: E * ceil(T / E) - T experts hold one empty seat beside their tokens. It moves at no
    cost, and never to an expert that holds one already.
    """

    def __init__(self, score_TE: np.ndarray, price_E: np.ndarray) -> None:
        tokens, experts = score_TE.shape
        self.score_TE = score_TE
        self.price_E = price_E
        self.expert_T = (score_TE - price_E).argmax(axis=1)
        self.seats = math.ceil(tokens / experts)
        # The empty seats start where prices are lowest: there, moving one never costs less than the price difference.
        self.empty_E = np.zeros(experts, dtype=np.int64)
        self.empty_E[np.argsort(price_E, kind="stable")[: experts * self.seats - tokens]] = 1
        order_T = np.argsort(self.expert_T, kind="stable")
        self.load_E = np.bincount(self.expert_T, minlength=experts)
        self.members = np.split(order_T, np.cumsum(self.load_E)[:-1])
        self.cost_EE = np.full((experts, experts), np.inf)
        for expert in range(experts):
            self._update_costs(expert)

    def balance(self) -> None:
        """Move tokens until every expert holds `seats`, its empty seat included."""
        while (excess_E := self.load_E + self.empty_E - self.seats).any():
            distance_E, parent_E = self._cheapest_chains(excess_E > 0)
            self.price_E = self.price_E - distance_E
            used: set[int] = set()
            # At the new prices every one of these chains costs nothing but the price difference. Those without a common
            # expert do not touch each other's costs and can all be used.
            for target in sorted(np.flatnonzero(excess_E < 0).tolist(), key=distance_E.__getitem__):
                chain = [target]
                while parent_E[chain[0]] >= 0:
                    chain.insert(0, int(parent_E[chain[0]]))
                if used.isdisjoint(chain):
                    self._move(chain, int(min(excess_E[chain[0]], -excess_E[target])))
                    used.update(chain)

    def _update_costs(self, expert: int) -> None:
        """Take the costs of moving a token away from an expert, whose members changed."""
        score_NE = self.score_TE[self.members[expert]]
        if len(score_NE):
            self.cost_EE[expert] = (score_NE[:, expert, None] - score_NE).min(axis=0)
        else:
            self.cost_EE[expert] = np.inf
        self.cost_EE[expert, expert] = np.inf

    def _cheapest_chains(self, source_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each expert's distance from the nearest source in reduced costs, and the expert before it (or -1).

        Bellman and Ford's sweeps over all edges at once: their number is the length of the longest chain, a few.
        """
        seat_moves_EE = (self.empty_E[:, None] == 1) & (self.empty_E == 0)
        cost_EE = np.where(seat_moves_EE, np.minimum(self.cost_EE, 0), self.cost_EE)
        # Rounding can leave a reduced cost of -1e-17, with which chains could run in circles.
        reduced_EE = np.maximum(cost_EE - self.price_E[:, None] + self.price_E, 0)
        distance_E = np.where(source_E, 0.0, np.inf)
        parent_E = np.full(len(distance_E), -1)
        while True:
            through_EE = distance_E[:, None] + reduced_EE
            before_E = through_EE.argmin(axis=0)
            through_E = through_EE[before_E, np.arange(len(before_E))]
            nearer_E = through_E < distance_E
            if not nearer_E.any():
                return distance_E, parent_E
            distance_E = np.where(nearer_E, through_E, distance_E)
            parent_E = np.where(nearer_E, before_E, parent_E)

    def _move(self, chain: list[int], most: int) -> None:
        """Move at most `most` tokens along a chain: as many as cost the same on each of its edges."""
        edges = list(itertools.pairwise(chain))
        moves = [self._movers(source, target) for source, target in edges]
        many = min(most, *(1 if movers is None else len(movers) for movers in moves))
        for (source, target), movers in zip(edges, moves, strict=True):
            if movers is None:
                self.empty_E[source], self.empty_E[target] = 0, 1
            else:
                self.expert_T[movers[:many]] = target
                self.load_E[source] -= many
                self.load_E[target] += many
        for expert in chain:
            self.members[expert] = np.flatnonzero(self.expert_T == expert)
            self._update_costs(expert)

    def _movers(self, source: int, target: int) -> "np.ndarray | None":
        """Return the tokens that move from one expert to another at its cost; None where the empty seat moves."""
        cost = self.cost_EE[source, target]
        if self.empty_E[source] and not self.empty_E[target] and cost >= 0:
            return None
        members = self.members[source]
        return members[self.score_TE[members, source] - self.score_TE[members, target] == cost]
