#!/usr/bin/env python3
"""Expert parallelism: where the time of our sparse layer goes, compared with fairscale's `MOELayer`, on the CPU over
gloo.

    python benchmarks/communication.py [--processes P] [--experts E ...] [--json FILE] [--out FILE]

Each rank is one single-threaded process. Every rank has T tokens with Zipf-distributed ids; a balanced hash table
assigns them to E experts: D to F, ReLU, F to D. All candidates run forward and backward (gradients of input and
parameters), in turn, in one run. A call takes as long as its slowest rank, after a barrier. Ratios are taken within a
round: the median (quartiles) of all rounds.

- ours: `SparseLayer` with a hash route. The call includes the plan and its exchange of split sizes.
- top-1: `MOELayer` with a gate of the same hash route, nothing dropped: its buffers have C rows, the largest load of
  any expert from any rank, found within the call. It does the same work, so output and gradients must equal ours.
- top-2: `MOELayer` with its own `Top2Gate`, which is what its users get: two experts per token, so twice the rows, in
  buffers of 2 T / E rows, beyond which it drops. The gradient of its auxiliary loss is left out.
- dense: T rows through one network of the same width on each rank.

`outside` is 1 - experts / ours: the share of our time outside the experts (plan, dispatch, exchange, combine, report,
and waits for other ranks). The experts' time is everything that `ExpertFeedForward` does (matrix products, biases,
ReLU) on the slowest rank, so uneven loads of the ranks do not count as overhead. `busiest` is the largest number of
rows on one rank, divided by T: about the least that ours / dense can be.

`MB` (10^6 bytes): the bytes of the rows sent from rank to rank in one call, forward and backward, all ranks together.
For `MOELayer` these are full buffers, E x C x D x 4 bytes in each of four exchanges, minus the rows that stay on their
rank. `MOELayer` dispatches and combines by products with T x E x C masks, which cost 2 T / 3 F of what its experts cost
on E x C rows, so the ratios rise with T / F and with C.

The split of one call: each part alone, after a barrier of its own, forward and (if it has one) backward. `route` makes
the plan, `split sizes` exchanges the numbers of rows (forward only), `gather` takes the rows from the tokens, `rows` is
the exchange of rows and of their gradients in both directions, and `combine` puts the rows back. `parts / ours` is the
sum of the parts divided by the whole.

Chunks (forward only, the plan made before): `whole` is dispatch, experts and combine as in the layer, all rows at once;
in N chunks (`chunked_exchange.py`) the next chunk's rows travel while the experts work. A ratio below 1 means that
chunks pay.

The JSON file holds the same: of every row the median, quartiles, ratio to dense (of those forward only: to dense
forward only), and for ours the parts in seconds, in which `exchange` is rows and split sizes together.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from chunked_exchange import ChunkedExchange
from fairscale.nn import MOELayer, Top2Gate
from rich.console import Console
from torch import Tensor, nn

from fairseq_hash.cli import Parser
from fairseq_hash.core.progress import Display
from fairseq_hash.hashing import TableShape, build_table
from fairseq_hash.moe.all_to_all import SplitSizes
from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.dispatchers import make_dispatcher
from fairseq_hash.moe.experts import ExpertFeedForward
from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.routing_context import HashRoute, RoutingContext
from fairseq_hash.moe.token_dispatcher import combine, dispatch
from fairseq_hash.parallel.groups import ExpertParallel, expert_parallel
from fairseq_hash.provenance import listed, provenance

VOCABULARY = 8000
# The call, the tensors whose gradients to clear, the input, and the gradient of the output.
Candidate = tuple[Callable[[Tensor], Tensor], nn.Module, Tensor, Tensor]
# The parts of one call of ours, in order.
PARTS = ("route", "split sizes", "gather", "rows", "experts", "combine")
# fp32 rounding, relative to a tensor's largest entry: both sum some hundreds of products, in different orders.
TOLERANCE = 1e-5


class HashGate(nn.Module):
    """A hash route (int64, `[T]`) in the form of fairscale's gates, with room for every token."""

    def __init__(self, expert_T: Tensor, parallel: ExpertParallel) -> None:
        super().__init__()
        self.expert_T = expert_T
        self.parallel = parallel

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the auxiliary loss (zero), combine weights `[T, E, C]` and dispatch mask (bool, the same)."""
        where_T = (torch.arange(len(x_TD)), self.expert_T)
        expert_TE = F.one_hot(self.expert_T, self.parallel.num_experts)
        most = expert_TE.sum(0).max()
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.parallel.group)
        self.capacity = int(most)
        mask_TEC = torch.zeros(*expert_TE.shape, self.capacity, dtype=torch.bool)
        mask_TEC[(*where_T, expert_TE.cumsum(0)[where_T] - 1)] = True
        return x_TD.new_zeros(()), mask_TEC.to(x_TD.dtype), mask_TEC


def draw_tokens(tokens: int, num_experts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return this rank's token ids `[T]` and their experts `[T, 1]`."""
    zipf_V = 1 / torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    counts = (1_000_000 * zipf_V).long().tolist()
    table = build_table("balanced", [str(token) for token in range(VOCABULARY)], counts, TableShape(num_experts), seed)
    generator = torch.Generator().manual_seed(seed)
    token_PT = torch.multinomial(zipf_V.expand(dist.get_world_size(), -1), tokens, True, generator=generator)
    token_T = token_PT[dist.get_rank()]
    return token_T, torch.from_numpy(table.expert_HK)[token_T]


def feed_forward(width: int, hidden: int) -> nn.Sequential:
    """Return one network as fairscale's users write it."""
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


def one_by_one(experts: ExpertFeedForward) -> nn.ModuleList:
    """Return this rank's experts as one network each, the weights copied."""
    networks = nn.ModuleList()
    for values in zip(*experts.parameters(), strict=True):
        networks.append(feed_forward(values[0].shape[1], values[0].shape[0]))
        networks[-1].load_state_dict(dict(zip(networks[-1].state_dict(), values, strict=True)))
    return networks


def call(forward: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, grad: Tensor) -> tuple[float, Tensor]:
    """Return the seconds of one call, forward and backward, and its output. All ranks begin together."""
    module.zero_grad()
    x.grad = None
    dist.barrier()
    start = time.perf_counter()
    y = forward(x)
    y.backward(grad)
    return time.perf_counter() - start, y.detach()


@torch.no_grad()
def call_forward(forward: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of one call without a backward pass, and its output. All ranks begin together."""
    dist.barrier()
    start = time.perf_counter()
    y = forward()
    return time.perf_counter() - start, y


def over_ranks(tensor: Tensor, how: dist.ReduceOp) -> Tensor:
    """Return the sum or maximum over all ranks."""
    tensor = tensor.clone()
    dist.all_reduce(tensor, op=how)
    return tensor


def largest_difference(candidates: dict[str, Candidate], experts: nn.Module, networks: nn.ModuleList) -> float:
    """Return the largest difference between ours and top-1 on any rank, in output and gradients, relative to the
    tensor's largest entry.
    """
    x_LBD = candidates["ours"][2]
    ours = [call(*candidates["ours"])[1], x_LBD.grad, *(p.grad for p in experts.parameters())]
    top_1 = [call(*candidates["top-1"])[1], x_LBD.grad]
    stacked = zip(*(network.parameters() for network in networks), strict=True)
    top_1.extend(torch.stack([p.grad for p in same]) for same in stacked)
    differences = [(a - b).abs().max() / b.abs().max() for a, b in zip(ours, top_1, strict=True)]
    return over_ranks(torch.stack(differences).max(), dist.ReduceOp.MAX).item()


def spread(values: Tensor, digits: str = ".2f") -> str:
    """Return the median (quartiles) of all rounds."""
    low, median, high = quartiles(values)
    return f"{median:{digits}} ({low:{digits}} to {high:{digits}})"


def quartiles(values: Tensor) -> list[float]:
    """Return the first quartile, the median and the third."""
    return torch.quantile(values.double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()


def measure(num_experts: int, arguments: argparse.Namespace, display: Display) -> dict[str, Any]:
    """Return the rows of one number of experts by table, and those for JSON, or `error`; the same on every rank."""
    tokens, width = arguments.tokens, arguments.width
    parallel = expert_parallel(num_experts, arguments.processes)
    _token_T, expert_TK = draw_tokens(tokens, num_experts, arguments.seed)
    torch.manual_seed(arguments.seed)  # the same on all ranks; the weights of each expert also depend on its id
    experts = ExpertFeedForward(parallel.expert_ids, width, arguments.hidden, torch.relu, 0.0, (0,))
    layer, networks = SparseLayer(None, experts, make_dispatcher(parallel), hash_route=0), one_by_one(experts)
    top_1 = MOELayer(HashGate(expert_TK.squeeze(1), parallel), networks, parallel.group)
    top_2 = MOELayer(Top2Gate(width, num_experts), networks, parallel.group)
    dense = feed_forward(width, arguments.hidden)

    def ours(x_LBD: Tensor) -> Tensor:
        route = HashRoute(Assignment(expert_TK), make_dispatcher(parallel).begin(expert_TK))
        return layer(x_LBD, RoutingContext(None, [route]))[0]

    torch.manual_seed(arguments.seed + 1 + parallel.rank)
    x_LBD, grad_LBD = torch.randn(2, tokens, 1, width)
    plan = make_dispatcher(parallel).begin(expert_TK).plan
    on_this_rank = replace(plan, exchange=None)  # dispatch and combine without the exchange
    x_TD, grad_TD = x_LBD.squeeze(1).clone(), grad_LBD.squeeze(1).clone()
    leaving_RD, grad_leaving_RD = (dispatch(tensor, on_this_rank) for tensor in (x_TD, grad_TD))
    rows_RD, grad_RD = (dispatch(tensor, plan) for tensor in (x_TD, grad_TD))
    for tensor in (x_LBD, x_TD, leaving_RD, rows_RD):
        tensor.requires_grad_()
    nothing = nn.Module()
    candidates = {
        "ours": (ours, layer, x_LBD, grad_LBD),
        "top-1": (top_1, top_1, x_LBD, grad_LBD),
        "top-2": (top_2, top_2, x_LBD, grad_LBD),
        "dense": (dense, dense, x_LBD, grad_LBD),
        "experts": (lambda x_RD: experts(x_RD, plan.rows_per_expert), experts, rows_RD, grad_RD),
        "gather": (lambda x_TD: dispatch(x_TD, on_this_rank), nothing, x_TD, grad_leaving_RD),
        "rows": (lambda x_RD: plan.exchange.back(plan.exchange.there(x_RD)), nothing, leaving_RD, grad_leaving_RD),
        "combine": (lambda x_RD: combine(x_RD, on_this_rank, None), nothing, leaving_RD, grad_TD),
    }
    alone = ExpertParallel(num_experts)
    of_chunks = [chunks for chunks in arguments.chunks if chunks <= parallel.local_experts]
    chunked = {
        f"{chunks} chunks": ChunkedExchange(plan, expert_TK.squeeze(1), experts, parallel, chunks)
        for chunks in of_chunks
    }
    forward_only = {
        "route": lambda: make_dispatcher(alone).begin(expert_TK).plan,
        "split sizes": lambda: SplitSizes(plan.tokens_per_expert_E, parallel).wait(),
        "dense, forward": lambda: dense(x_TD),
        "whole": lambda: combine(experts(dispatch(x_TD, plan), plan.rows_per_expert), plan, None),
        **{name: lambda way=way: way(x_TD) for name, way in chunked.items()},
    }

    sent = parallel.traffic.bytes
    difference = largest_difference(candidates, experts, networks)
    sent = parallel.traffic.bytes - sent  # set by the one call of ours above
    if not difference <= TOLERANCE:  # NaN does not count as agreement
        return {"error": f"{num_experts} experts: ours and top-1 differ by {difference:.0e}; rounding is {TOLERANCE}"}
    whole_TD = call_forward(forward_only["whole"])[1]
    for name in chunked:
        apart = (call_forward(forward_only[name])[1] - whole_TD).abs().max() / whole_TD.abs().max()
        apart = over_ranks(apart, dist.ReduceOp.MAX).item()
        if not apart <= TOLERANCE:
            return {"error": f"{num_experts} experts: {name} and whole differ by {apart:.0e}; rounding is {TOLERANCE}"}

    rounds = []
    for number in range(arguments.rounds + 1):  # the first warms up
        rounds.append([call(*candidate)[0] for candidate in candidates.values()])
        rounds[-1] += [call_forward(forward)[0] for forward in forward_only.values()]
        display.advance(number / arguments.rounds, f"{number} of {arguments.rounds} rounds")
    slowest = over_ranks(torch.tensor(rounds[1:]), dist.ReduceOp.MAX).t()
    seconds = dict(zip([*candidates, *forward_only], slowest, strict=True))
    megabytes = {"ours": over_ranks(torch.tensor(sent), dist.ReduceOp.SUM).item() / 1e6}
    for name, capacity in (("top-1", top_1.gate.capacity), ("top-2", 2 * tokens // num_experts)):
        leaving = (num_experts - parallel.local_experts) * capacity * arguments.processes
        megabytes[name] = 4 * leaving * width * x_LBD.element_size() / 1e6
    busiest = over_ranks(torch.tensor(len(rows_RD)), dist.ReduceOp.MAX).item() / tokens
    return {
        "layers": layers_row(num_experts, seconds, megabytes, busiest),
        "parts": parts_row(num_experts, seconds),
        "chunks": {
            "experts": str(num_experts),
            "whole ms": spread(1000 * seconds["whole"], ".1f"),
            **{f"{name} / whole": spread(seconds[name] / seconds["whole"]) for name in chunked},
        },
        "json": json_rows(num_experts, tokens, seconds, megabytes, list(chunked)),
    }


def layers_row(
    num_experts: int, seconds: dict[str, Tensor], megabytes: dict[str, float], busiest: float
) -> dict[str, str]:
    """Return a row of the table of layers by columns."""
    return {
        "experts": str(num_experts),
        **{f"{name} / ours": spread(seconds[name] / seconds["ours"]) for name in ("top-1", "top-2")},
        "ours / dense": spread(seconds["ours"] / seconds["dense"]),
        "busiest": f"{busiest:.2f}",
        "outside": spread(1 - seconds["experts"] / seconds["ours"], ".0%"),
        "ours ms": spread(1000 * seconds["ours"], ".1f"),
        **{f"{name} MB": f"{value:.1f}" for name, value in megabytes.items()},
    }


def parts_row(num_experts: int, seconds: dict[str, Tensor]) -> dict[str, str]:
    """Return a row of the table of parts by columns."""
    whole = sum(seconds[name] for name in PARTS) / seconds["ours"]
    parts = {f"{name} ms": spread(1000 * seconds[name]) for name in PARTS}
    return {"experts": str(num_experts), **parts, "parts / ours": spread(whole)}


def json_rows(
    num_experts: int, tokens: int, seconds: dict[str, Tensor], megabytes: dict[str, float], chunked: list[str]
) -> list[dict[str, Any]]:
    """Return the rows of the JSON file."""
    shown = {"dense": "dense", "ours": "dense", "top-1": "dense", "top-2": "dense"}
    shown |= dict.fromkeys(("dense, forward", "whole", *chunked), "dense, forward")
    rows = []
    for name, dense in shown.items():
        low, median, high = quartiles(seconds[name])
        forward = ", forward" if dense != "dense" and name != dense else ""
        row = {"experts": num_experts, "tokens": tokens, "candidate": name + forward, "seconds": median}
        row |= {"low": low, "high": high, "ratio": quartiles(seconds[name] / seconds[dense])[1], "peak_bytes": None}
        rows.append(row | ({"megabytes": megabytes[name]} if name in megabytes else {}))
    medians = {name: quartiles(seconds[name])[1] for name in PARTS}
    medians["exchange"] = quartiles(seconds["rows"] + seconds["split sizes"])[1]
    parts = {name: medians[name] for name in ("route", "gather", "exchange", "experts", "combine")}
    rows[1] |= {"parts": parts, "rows_seconds": medians["rows"], "split_sizes_seconds": medians["split sizes"]}
    return rows


def be_rank(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    """Run one rank. The first rank shows the progress and writes the rows to the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=arguments.processes)
    rows: list[dict[str, Any]] = []
    with Display(len(arguments.experts), Console(stderr=True, highlight=False, quiet=rank > 0)) as display:
        for num_experts in arguments.experts:
            display.begin(f"{num_experts} experts", 1)
            rows.append(measure(num_experts, arguments, display))
            if "error" in rows[-1]:
                break
            display.end(f"ours / dense {rows[-1]['layers']['ours / dense']}")
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    """Return the arguments, checked."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, metavar="P", help="ranks, 2 or more (default: 2)")
    parser.add_argument(
        "--experts", type=int, nargs="+", default=[8, 16, 32, 64], metavar="E", help="default: 8 16 32 64"
    )
    parser.add_argument("--tokens", type=int, default=4096, metavar="T", help="of each rank (default: 4096)")
    parser.add_argument("--width", type=int, default=256, metavar="D", help="of a token (default: 256)")
    parser.add_argument("--hidden", type=int, default=1024, metavar="F", help="width within an expert (default: 1024)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="calls of each that count (default: 9)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[2, 4], metavar="N", help="default: 2 4")
    parser.add_argument("--seed", type=int, default=0, help="of tokens, weights and gradients (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers: fairseq-hash report draws them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write what is printed to a file")
    arguments = parser.parse_args()
    for name, least in (("processes", 2), ("tokens", 1), ("width", 1), ("hidden", 1), ("rounds", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} {getattr(arguments, name)} is out of range; give a number of {least} or more")
    for experts in arguments.experts:
        if experts < 1 or experts % arguments.processes or arguments.tokens % experts:
            need = f"a multiple of --processes {arguments.processes} that divides --tokens {arguments.tokens}"
            parser.error(f"--experts {experts} cannot be shared by equal capacity; give {need}")
    for chunks in arguments.chunks:
        if chunks < 2:
            parser.error(f"--chunks {chunks} is out of range; give a number of 2 or more")
    for name in ("json", "out"):
        path = getattr(arguments, name)
        if path and not path.parent.is_dir():
            parser.error(f"--{name} {path}: the folder {path.parent} does not exist; make it first")
    return arguments


def main() -> None:
    """Measure, print provenance and table, and write them to a file if asked for."""
    arguments = parse()
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "out")}
    facts = provenance()
    command = " ".join(f"--{name} {str(value).strip('[]').replace(',', '')}" for name, value in settings.items())
    lines = ["# Shared experts", "", f"`python benchmarks/communication.py {command}`, which defines the columns"]
    lines += ["", *listed(facts)]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(be_rank, (arguments, folder), nprocs=arguments.processes)
        measured = json.loads(Path(folder, "rows.json").read_text())
    if "error" in measured[-1]:
        sys.exit(f"{sys.argv[0]}: {measured[-1]['error']}")
    lines += table([one["layers"] for one in measured])
    lines += ["", "## The split of one call", *table([one["parts"] for one in measured])]
    lines += ["", "## In chunks", *table([one["chunks"] for one in measured])]
    print("\n".join(lines))
    if arguments.json:
        rows = [row for one in measured for row in one["json"]]
        content = {"benchmark": "communication", "provenance": facts, "settings": settings, "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


def table(rows: list[dict[str, str]]) -> list[str]:
    """Return a Markdown table as lines. A column that a row lacks stays empty."""
    columns = dict.fromkeys(name for row in rows for name in row)
    lines = ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return lines + [f"| {' | '.join(row.get(name, '') for name in columns)} |" for row in rows]


if __name__ == "__main__":
    main()
