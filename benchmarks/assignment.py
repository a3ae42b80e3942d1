#!/usr/bin/env python3
"""Balanced assignment: ours compared with SciPy's optimum and, if it is built, with fairseq's auction.

    python benchmarks/assignment.py [--threads N] [--json FILE]

Each row is measured in one run, the solvers in turn; times are medians of repeated calls. `gap` is the distance of a
solver's value below SciPy's optimum, `loads` the smallest and largest load. fairseq's auction solver
(`fairseq/clib/libbase`) is not in its release. To measure it, too, put a build of it on PYTHONPATH as the module
`libbase`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fairseq_hash.moe.balanced_assignment import balanced_assignment
from fairseq_hash.provenance import provenance

SHAPES = ((2048, 16), (2048, 64), (4096, 64))
ROUNDS = 9


def scores(tokens: int, experts: int) -> Iterator[tuple[str, Tensor]]:
    """Yield scores by name: those of a router at initialisation, random ones, and hard ones."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(tokens, experts, generator=generator)
    other = torch.randn(tokens, experts, generator=generator)
    centroids = torch.nn.init.orthogonal_(torch.empty(experts, 512), gain=0.1, generator=generator)
    yield "router", torch.randn(tokens, 512, generator=generator) @ centroids.t()
    yield "normal", normal
    yield "unequal experts", normal + 3 * other[:1]
    yield "one order", normal[:, :1].abs() @ other[:1]
    yield "heavy tails", normal / other
    yield "ties", torch.randint(0, 4, (tokens, experts), generator=generator).float()
    yield "constant", torch.ones(tokens, experts)


def scipy_assignment(score_TE: Tensor) -> Tensor:
    """Return SciPy's optimum, with each expert as T / E columns."""
    seats = score_TE.shape[0] // score_TE.shape[1]
    columns = np.repeat(score_TE.double().numpy(), seats, axis=1)
    return torch.from_numpy(linear_sum_assignment(columns, maximize=True)[1] // seats)


def auction_assignment(score_TE: Tensor) -> Tensor:
    """Return the assignment of fairseq's auction, which returns the tokens in the order of their experts.

    A token without an expert, which happens if scores are equal, has expert -1.
    """
    import libbase

    order_T = libbase.balanced_assignment(score_TE)
    expert_T = torch.full((len(order_T),), -1)
    expert_T[order_T.long()] = torch.arange(len(order_T)) // (score_TE.shape[0] // score_TE.shape[1])
    return expert_T


def measure(score_TE: Tensor, solvers: "dict[str, Callable[[Tensor], Tensor]]") -> dict[str, dict[str, float]]:
    """Return milliseconds, gap and loads of each solver for one matrix of scores."""
    times: dict[str, list[float]] = {name: [] for name in solvers}
    results: dict[str, dict[str, float]] = {}
    for round_number in range(ROUNDS + 1):
        for name, solve in solvers.items():
            if name == "scipy" and round_number:
                continue  # once is enough, because it can take a minute
            start = time.perf_counter()
            expert_T = solve(score_TE)
            if round_number or name == "scipy":  # the first call of the others warms up
                times[name].append(1000 * (time.perf_counter() - start))
            served_T = expert_T >= 0
            load_E = torch.bincount(expert_T[served_T], minlength=score_TE.shape[1])
            value = score_TE.double()[served_T].gather(1, expert_T[served_T].unsqueeze(1)).sum().item()
            results[name] = {"value": value, "unserved": int((~served_T).sum())}
            results[name] |= {"least": int(load_E.min()), "most": int(load_E.max())}
    best = results["scipy"]["value"]
    for name, result in results.items():
        result["milliseconds"] = statistics.median(times[name])
        result["gap"] = (best - result.pop("value")) / max(abs(best), 1e-30)
    return results


def main() -> None:
    """Measure, print a table, and write JSON if asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of torch (default: 2)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to a file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    solvers = {"ours": balanced_assignment, "scipy": scipy_assignment}
    if find_spec("libbase"):
        solvers["auction"] = auction_assignment
    record = {**provenance(), "threads": arguments.threads, "rounds": ROUNDS, "rows": []}
    names = [name for name in solvers if name != "scipy"]
    heads = [f"{name} {what}" for name in names for what in ("ms", "gap", "loads")]
    print("| tokens x experts | scores | " + " | ".join(heads) + " | scipy ms |")
    print("|" + "---|" * (len(heads) + 3))
    for tokens, experts in SHAPES:
        for kind, score_TE in scores(tokens, experts):
            results = measure(score_TE, solvers)
            record["rows"].append({"tokens": tokens, "experts": experts, "scores": kind, **results})
            cells = []
            for name in names:
                one = results[name]
                gap = f"{one['unserved']} tokens unserved" if one["unserved"] else f"{one['gap']:.4%}"
                cells += [f"{one['milliseconds']:.1f}", gap, f"{one['least']} to {one['most']}"]
            row = " | ".join(cells)
            print(f"| {tokens} x {experts} | {kind} | {row} | {results['scipy']['milliseconds']:.0f} |", flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
