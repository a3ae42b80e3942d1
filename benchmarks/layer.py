#!/usr/bin/env python3
"""One sparse layer in one process: ours compared with a dense FFN, the published reference's way, and peers.

    python benchmarks/layer.py [--experts E ...] [--tokens T ...] [--ways W ...] [--dtype D] [--device D] [--json FILE]
                               [--out FILE]

T tokens with Zipf-distributed ids and independent normal activations go through E experts (D to F, ReLU, F to D),
forward and backward (gradients of input and parameters), or forward only. Parameters have the requested dtype, without
autocast. All candidates run in turn within each round, in one run. Only fairscale drops tokens.

- dense: T rows through one FFN, the lower limit.
- hash, switch, base: our `SparseLayer`. Hash includes the lookup in a balanced table and the plan; base includes the
  balanced assignment; with --forward-only it takes the nearest centroid, as in evaluation.
- hash (loop), hash (grouped), hash (padded): with --ways, hash with other implementations of its experts (`WAYS` in
  `fairseq_hash/moe/kernels/feed_forward.py`) than the default here.
- dense (graph), hash (graph): with --graphs, on a GPU, each as the replay of a CUDA graph: the time of the device
  without that of the host, which a training hides behind other layers' work. The ratio is to dense (graph).
- mask-and-loop: a list of FFNs; for each, mask the tokens, run, write back. It has the same hash route and weights as
  ours. Before timing, output and gradients must equal ours, up to rounding (`TOLERANCE`, `GRADIENT_TOLERANCE`).
- fairscale: `MOELayer` with `Top2Gate`: two experts per token, so twice the rows. Only in fp32 (its products take
  nothing else), if E divides T, and up to a limit on the size of its masks.
- transformers: `SwitchTransformersSparseMLP`, top-1, without biases, with room for all tokens; from the extra `peers`.

A candidate that cannot run, for lack of memory say, is left out with its reason.

Times are medians (quartiles) of all rounds; ratios to dense are medians of the ratios within a round. No candidate has
an auxiliary loss.

Memory. `peak` is the peak memory of a call minus the memory before it: activations, output, all gradients, but not the
weights. `memory` is (weights + peak) / (dense's weights + dense's peak + these weights + their gradients): how near a
layer comes to a dense FFN that merely holds all experts' weights and gradients, too. The denominator has one FFN more
than the numerator, 1 / E of the experts. The weights of many experts hide much working memory, so `working / dense`
compares peak minus the parameters' gradients with the same of dense. On the CPU this is resident memory, which counts
whole pages; if the system cannot reset its peak, these columns are left out. There our layers keep their gradients'
memory for the next call. `peak` counts that memory, and the measured calls reuse it.

The split of the hash layer: each part runs as a separate piece of autograd, forward and backward, in the same rounds.
route: lookup and plan; gather: `dispatch`; exchange: between ranks, here nothing; experts; combine; rest: the layer's
time minus the sum (its report, the parts of the plan made at first use, autograd's bookkeeping; below zero if pieces
take longer alone). `matmuls` are the experts' matrix products alone, on threads as in the layer, into existing buffers:
the time for gradient memory, biases and the activation counts as outside. `outside experts` and `outside matmuls` are
the shares of the layer's time outside them. `BASE assignment / route`: scores and balanced assignment of the same T and
E, divided by the route; measured if base is (it takes seconds for many tokens and experts). `FLOP/s` counts matrix
products; `rate` is that of one large product of the same dtype in the same rounds.

The JSON file (seconds, bytes; null where not measured): {"benchmark": "layer", "provenance": {...}, "settings": {...},
"left_out": [text, ...], "rows": [row, ...]}, each row {"experts": E, "tokens": T, "candidate": name, "seconds": median,
"low": .., "high": .. (quartiles), "ratio": to dense, "peak_bytes": .., "weight_bytes": .., "gradient_bytes": of the
parameters, "memory_ratio": .., "working_ratio": ..}. Rows of hash also have "way": of its experts, "parts": {"route",
"gather", "exchange", "experts", "combine", "rest": {"seconds", "low", "high", "share": of the layer}}, "beside":
{"matmuls", "assignment": the same}, and "figures": {"outside_experts", "outside_matmuls", "assignment_over_route",
"layer_flops_per_second", "matmuls_flops_per_second", "rate_flops_per_second"}.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from layer_case import ROUTERS, VOCABULARY, Case, reason
from peers import one_rank, transformers_version
from rich.console import Console
from rounds import Spread, graphed, in_rounds, peak_bytes

from fairseq_hash.cli import Parser
from fairseq_hash.core.progress import Display
from fairseq_hash.moe.kernels.feed_forward import WAYS
from fairseq_hash.provenance import listed, provenance, usable_cores

BY_DEFAULT = ("dense", "hash", "switch", "base", "mask-and-loop", "fairscale", "transformers")
CANDIDATES = tuple(dict.fromkeys((*BY_DEFAULT[:3], *ROUTERS, *BY_DEFAULT[3:])))
PARTS = ("route", "gather", "exchange", "experts", "combine", "rest")
BESIDE = ("matmuls", "assignment")
GRAPH = "graph"
LEAST_GRADIENTS = (
    2**24
)  # more bytes than this cannot be missing from a measured peak; of fewer, some pages may exist before


def memory(case: Case, calls: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the memory of each layer by its name."""
    sizes = {}
    for name, call in calls.items():
        weight_bytes = sum(leaf.nbytes for leaf in call.leaves[1:])  # the first leaf is the input
        call.run()
        # A loop makes no gradient for an expert without tokens.
        gradient_bytes = sum(leaf.nbytes for leaf in call.leaves[1:] if leaf.grad is not None)
        call.clear()
        peak = peak_bytes(call, case.device)
        if peak is not None and gradient_bytes > max(peak, LEAST_GRADIENTS):
            raise SystemExit(f"layer.py: the peak memory of {name} misses its gradients, so memory was kept unseen")
        sizes[name] = {"peak_bytes": peak, "weight_bytes": weight_bytes}
        sizes[name] |= {"gradient_bytes": gradient_bytes, "memory_ratio": None, "working_ratio": None}
    dense = sizes["dense"]
    for name, size in sizes.items():
        if size["peak_bytes"] is None or name == "dense":
            continue
        allowed = dense["weight_bytes"] + dense["peak_bytes"] + size["weight_bytes"] + size["gradient_bytes"]
        size["memory_ratio"] = (size["weight_bytes"] + size["peak_bytes"]) / allowed
        working = [one["peak_bytes"] - one["gradient_bytes"] for one in (size, dense)]
        size["working_ratio"] = working[0] / working[1] if min(working) > 0 else None
    return sizes


def split(seconds: dict[str, np.ndarray], case: Case) -> dict[str, Any]:
    """Return the split of the hash layer; times are arrays of all rounds."""
    layer = seconds["hash"]
    seconds = {**seconds, "exchange": np.zeros_like(layer)}
    seconds["rest"] = layer - sum(seconds[name] for name in PARTS if name != "rest")

    def share(name: str) -> dict[str, float]:
        return {**Spread.of(seconds[name]).as_seconds(), "share": float(np.median(seconds[name] / layer))}

    flops = 4 * case.tokens * case.width * case.hidden * (3 if case.backward else 1)
    figures = {
        "outside_experts": 1 - share("experts")["share"],
        "outside_matmuls": 1 - share("matmuls")["share"],
        "layer_flops_per_second": flops / float(np.median(layer)),
        "matmuls_flops_per_second": flops / float(np.median(seconds["matmuls"])),
        "rate_flops_per_second": 2 * case.large_product**3 / float(np.median(seconds["rate"])),
    }
    if "assignment" in seconds:
        figures["assignment_over_route"] = float(np.median(seconds["assignment"] / seconds["route"]))
    parts, beside = ({name: share(name) for name in names if name in seconds} for names in (PARTS, BESIDE))
    return {"parts": parts, "beside": beside, "figures": figures}


def measure(num_experts: int, tokens: int, arguments: argparse.Namespace, display: Display) -> list[dict[str, Any]]:
    """Return one row per candidate."""
    case = Case(num_experts, tokens, arguments)
    pieces = case.pieces("base" in arguments.candidates)  # first, so that one-time work happens beside their buffers
    calls, left_out = case.candidates([*arguments.candidates, "mask-and-loop"], arguments.ways)
    arguments.left_out += left_out
    if "mask-and-loop" in calls:
        arguments.left_out += case.check(calls)
    calls = {name: call for name, call in calls.items() if name.partition(" (")[0] in arguments.candidates}
    replays, refused = graphs(calls) if arguments.graphs else ({}, [])
    arguments.left_out += [f"{line} with {num_experts} experts, {tokens} tokens" for line in refused]
    rounds = []
    for seconds in in_rounds({**calls, **replays, **pieces}, arguments.rounds, case.device):
        rounds.append(seconds)
        display.advance(len(rounds) / arguments.rounds, f"{len(rounds)} of {arguments.rounds} rounds")
    arrays = {name: np.array([seconds[name] for seconds in rounds]) for name in rounds[0]}
    rows = []
    for name, sizes in memory(case, calls).items():
        row = {"experts": num_experts, "tokens": tokens, "candidate": name, **Spread.of(arrays[name]).as_seconds()}
        rows.append(row | {"ratio": float(np.median(arrays[name] / arrays["dense"])), **sizes})
        if name == "hash":
            rows[-1] |= {"way": case.way, **split(arrays, case)}
    for name in replays:
        row = {"experts": num_experts, "tokens": tokens, "candidate": name, **Spread.of(arrays[name]).as_seconds()}
        rows.append(row | {"ratio": float(np.median(arrays[name] / arrays[f"dense ({GRAPH})"]))})
    return rows


def graphs(calls: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return dense and hash as replays of CUDA graphs, by name; nothing, and the reason, if one cannot be captured."""
    try:
        return {f"{name} ({GRAPH})": graphed(calls[name]) for name in ("dense", "hash")}, []
    except RuntimeError as error:
        return {}, [f"{GRAPH} is left out: {reason(error)}"]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return ["", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *(f"| {' | '.join(row)} |" for row in rows)]


def optional(value: "float | None", digits: str) -> str:
    """Return a number, or a dash if it was not measured."""
    return "-" if value is None else f"{value:{digits}}"


def milliseconds(time: dict[str, float]) -> str:
    """Return a time as the median (quartiles)."""
    return Spread(time["seconds"], time["low"], time["high"]).text(1000, ".2f")


def report(rows: list[dict[str, Any]]) -> list[str]:
    """Return all tables."""
    layers, parts, figures = [], [], []
    for row in rows:
        shape = [str(row["experts"]), str(row["tokens"])]
        peak = None if row.get("peak_bytes") is None else row["peak_bytes"] / 1e6
        sizes = [optional(peak, ".1f"), *(optional(row.get(name), ".2f") for name in ("memory_ratio", "working_ratio"))]
        layers.append([*shape, row["candidate"], milliseconds(row), f"{row['ratio']:.2f}", *sizes])
        if row["candidate"] != "hash":
            continue
        shares = [f"{1000 * part['seconds']:.2f} ({part['share']:.1%})" for part in row["parts"].values()]
        parts.append([*shape, row["way"], milliseconds(row), *shares])
        figure = row["figures"]
        rate = figure["rate_flops_per_second"]
        speeds = [figure[f"{name}_flops_per_second"] for name in ("layer", "matmuls")]
        outside = [f"{figure[f'outside_{name}']:.1%}" for name in ("experts", "matmuls")]
        times = [milliseconds(row["beside"][name]) if name in row["beside"] else "-" for name in BESIDE]
        speed = [*(f"{speed / 1e12:.3g} ({speed / rate:.0%})" for speed in speeds), f"{rate / 1e12:.3g}"]
        figures.append(
            [*shape, times[0], *outside, times[1], optional(figure.get("assignment_over_route"), ".1f"), *speed]
        )
    shape = ["experts", "tokens"]
    heads = [*shape, "layer", "ms", "/ dense", "peak MB", "memory", "working / dense"]
    lines = [*table(heads, layers), "", "The hash layer's parts, ms (share of the layer):"]
    lines += [
        *table([*shape, "experts by", "hash ms", *PARTS], parts),
        "",
        "Beside the hash layer, speeds in TFLOP/s (of the rate):",
    ]
    heads = [*shape, "matmuls ms", "outside experts", "outside matmuls", "BASE assignment ms", "/ route"]
    return lines + table([*heads, "layer", "matmuls", "rate"], figures)


def parse() -> argparse.Namespace:
    """Return the arguments, checked."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64, 128], metavar="E", help="default: 16 64 128")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096], metavar="T", help="of a call (default: 4096)")
    parser.add_argument("--width", type=int, default=512, metavar="D", help="of a token (default: 512)")
    parser.add_argument("--hidden", type=int, default=2048, metavar="F", help="width within an expert (default: 2048)")
    parser.add_argument(
        "--candidates",
        nargs="+",
        choices=CANDIDATES,
        default=list(BY_DEFAULT),
        help=f"dense and hash always are among them; default: {' '.join(BY_DEFAULT)}",
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=tuple(WAYS),
        default=[],
        help="measure hash once more by each of these ways of its experts, beside the one that it takes",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of parameters")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--graphs", action="store_true", help="also dense and hash as replays of CUDA graphs")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="calls of each that count (default: 9)")
    parser.add_argument(
        "--threads", type=int, default=usable_cores(), metavar="N", help="of torch (default: all cores)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of tokens, weights and gradients (default: 0)")
    parser.add_argument("--forward-only", action="store_true", help="as in evaluation, without gradients")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures: fairseq-hash report draws them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write what is printed to a file")
    arguments = parser.parse_args()
    for name, least in (("width", 1), ("hidden", 1), ("rounds", 1), ("threads", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} {getattr(arguments, name)} is out of range; give a number of {least} or more")
    arguments.ways = list(dict.fromkeys(arguments.ways))
    arguments.candidates = [name for name in CANDIDATES if name in ("dense", "hash", *arguments.candidates)]
    for experts in arguments.experts:
        if not 1 <= experts <= VOCABULARY:
            parser.error(f"--experts {experts} is out of range; give numbers from 1 to {VOCABULARY}")
    for tokens in arguments.tokens:
        if tokens < 1:
            parser.error(f"--tokens {tokens} is out of range; give numbers of 1 or more")
    if arguments.graphs and arguments.device != "cuda":
        parser.error("--graphs is for --device cuda")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; use --device cpu")
    for name in ("json", "out"):
        file = getattr(arguments, name)
        if file and not file.parent.is_dir():
            parser.error(f"--{name} {file}: the folder {file.parent} does not exist; make it first")
    return arguments


def main() -> None:
    """Measure, print provenance and tables, and write files if asked for."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "out")}
    settings["transformers"] = transformers_version()
    settings["float32 matmul precision"] = torch.get_float32_matmul_precision()
    arguments.left_out = []
    if "transformers" in arguments.candidates and not transformers_version():
        arguments.candidates.remove("transformers")
        arguments.left_out.append("transformers is left out: it is not installed (pip install -e '.[peers]')")
    rows: list[dict[str, Any]] = []
    record = {"benchmark": "layer", "provenance": provenance(), "settings": settings, "left_out": arguments.left_out}
    # A number given twice is measured once.
    cases = list(dict.fromkeys(itertools.product(arguments.experts, arguments.tokens)))
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with one_rank(torch.device(arguments.device)), Display(len(cases), console) as display:
        for num_experts, tokens in cases:
            display.begin(f"{num_experts} experts, {tokens} tokens", 1)
            try:
                rows += measure(num_experts, tokens, arguments, display)
            except RuntimeError as error:  # raised by torch, mostly because memory is too small
                arguments.left_out.append(f"{num_experts} experts, {tokens} tokens are left out: {reason(error)}")
                display.end(arguments.left_out[-1])
                continue
            if arguments.json:  # after each size, because a run may be ended before the last one
                arguments.json.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
            ratios = {row["candidate"]: row["ratio"] for row in rows}  # memory of the last case
            display.end(f"hash / dense {ratios['hash']:.2f}")
    if not rows:
        raise SystemExit(f"layer.py: nothing could be measured: {arguments.left_out[-1]}")
    if arguments.json:
        arguments.json.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
    lines = ["# One sparse layer", "", "By `benchmarks/layer.py`, which defines the columns, with"]
    lines += [", ".join(f"{name} {value}" for name, value in settings.items()).replace("[", "").replace("]", "") + "."]
    lines += ["", *listed(record["provenance"])]
    lines += [f"- {text}" for text in arguments.left_out] + report(rows)
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
