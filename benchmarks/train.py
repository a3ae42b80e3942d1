#!/usr/bin/env python3
"""Whole trainings compared by router: updates per second, memory, and decoding token by token.

    python benchmarks/train.py [--data DIR] [--experts E ...] [--layers N] [--tokens T] [--json FILE] [--out FILE]

Task, model, criterion and trainer are fairseq's, built as `fairseq-train` builds them, in one process. The candidates
are experiments of configs/laptop with their recipe, at the size that is given here. In every round each candidate takes
one update with the same batch, in turn, and another candidate begins each round. An update is the whole
`Trainer.train_step`: forward, backward, clipping, Adam, statistics. All candidates do the same products per token; they
differ in the FFNs of `--sparse-layers`.

- dense: plain FFNs.
- hash: a balanced hash table on the tokens.
- switch: capacity factor 1.25 and jitter 0.01, as published.
- base: a balanced assignment of every batch.

Two more are measured if `--candidates` names them: the dense model outside fairseq, from the same weights (`plain.py`);
with --bf16 its weights stay in fp32, and its products run under autocast:

- plain: a plain PyTorch loop with fused attention and fused AdamW.
- compiled: the same, model and loss by torch.compile, which needs a compiler; the first update compiles.

A candidate that fails is left out, with a line that says why; dense must not fail.

Times are medians (quartiles) over the rounds. Ratios are taken within a round: `/ dense`, and `hash / BASE`, the
updates per second of hash divided by those of BASE, for which Hash Layers (Roller et al. 2021) reports 1.11.

`TFLOP/s` counts the matrix products of the dense model, forward and backward, with attention over the full context, as
`fairseq-hash plan` does. The count is the same for every candidate, whatever else it does. Beside it is the share of
`rate`, the speed of a large matrix product of the same dtype in the same rounds.

`peak MB` (10^6 bytes) is the peak memory of one update: the candidate's own weights, buffers and optimizer state, and
the memory that its update allocates on top, gradients included. On a GPU the allocator counts it; on a CPU it is the
rise of the process's peak resident memory, which only Linux can reset. `held MB` is the memory of weights, gradients,
optimizer state and buffers after an update, and `planned` is the figure of `fairseq-hash plan` for the first three. All
candidates of one number of experts stay in memory together: about 16 bytes per parameter in fp32 and 20 in bf16,
counting all experts.

Decoding: after a prefix, every step gives the model's decoder one more token of each sentence, with fairseq's
incremental state, in evaluation mode. Ratios are taken within a step.
"""

import argparse
import gc
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import LARGE_PRODUCT
from rich.console import Console
from rounds import Spread
from train_tables import markdown
from trainings import (
    HEAD,
    PLAIN,
    ROUTERS,
    SENTENCE,
    FairseqTraining,
    Training,
    batches_of,
    dtype_of,
    flops_of_token,
    held_bytes,
    make_training,
    peak_bytes,
    seconds_of,
)
from trainings import build as build  # these three for profile_step.py
from trainings import trainer_options as trainer_options
from trainings import update as update

from fairseq_hash.cli import Parser
from fairseq_hash.core.errors import UserError
from fairseq_hash.core.progress import Display
from fairseq_hash.provenance import listed, provenance, usable_cores

RATE = "rate"  # the name of the large product beside the candidates
PRODUCTS = {"cpu": 1, "cuda": 10}  # products per round: a single one ends before a GPU is busy
REASON = 200  # characters shown of an error, which can be pages long
WARM_UP = 2  # rounds: the first one allocates gradients and Adam's state


def in_turn(
    calls: dict[str, Callable[[int], float]],
    rounds: int,
    tell: Callable[[int], None],
    leave_out: "Callable[[str, Exception], None] | None" = None,
) -> dict[str, list]:
    """Return the seconds of each candidate's calls by round. Each round begins with another candidate.

    A candidate that fails has no more turns, and `leave_out` is called; without `leave_out` its error is raised.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        names = list(seconds)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            try:
                seconds[name].append(calls[name](number))
            except Exception as error:
                if leave_out is None:
                    raise
                leave_out(name, error)
                del seconds[name]
        tell(number + 1)
    return seconds


def large_product(arguments: argparse.Namespace) -> tuple[Callable[[], float], float]:
    """Return a function that measures a large matrix product, in seconds, and its FLOPs."""
    size, products = LARGE_PRODUCT[arguments.device], PRODUCTS[arguments.device]
    square = torch.randn(size, size).to(arguments.device, dtype_of(arguments)[0])
    out = torch.empty_like(square)

    def multiply() -> None:
        for _ in range(products):
            torch.mm(square, square, out=out)

    return lambda: seconds_of(multiply), 2 * size**3 * products


@torch.no_grad()
def decode(trainings: dict[str, FairseqTraining], token_BL: torch.Tensor, before: int) -> dict[str, list]:
    """Return the seconds of each candidate's steps, the tokens of `token_BL` after the first `before` one by one."""
    states: dict[str, dict[str, Any]] = {name: {} for name in trainings}
    decoders = {name: training.trainer.model.eval().decoder for name, training in trainings.items()}
    token_BL = token_BL.to(trainings["dense"].trainer.device)

    def step(name: str, length: int) -> float:
        return seconds_of(lambda: decoders[name](token_BL[:, :length], incremental_state=states[name]))

    for length in range(1, before + 1):  # fairseq's decoder takes one token a call
        for name in trainings:
            step(name, length)
    calls = {name: lambda number, name=name: step(name, before + 1 + number) for name in trainings}
    return in_turn(calls, token_BL.shape[1] - before, lambda number: None)


def row(experts: int, tokens: int, candidate: str, seconds: list[float], dense: list[float]) -> dict[str, Any]:
    """Return one candidate's entry in the JSON file: median, quartiles, and the ratio within rounds."""
    ratio = statistics.median(one / other for one, other in zip(seconds, dense, strict=True))
    shape = {"experts": experts, "tokens": tokens, "candidate": candidate}
    return {**shape, **Spread.of(seconds).as_seconds(), "ratio": ratio, "peak_bytes": None}


def measure(arguments: argparse.Namespace, experts: int, data: Path, display: Display) -> list[dict[str, Any]]:
    """Return the rows of one number of experts."""
    display.begin(f"{experts} experts", 1)
    trainings: dict[str, Training] = {}

    def leave_out(name: str, error: Exception) -> None:
        if name in ("dense", RATE):
            raise error
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "it says no more")
        line = f"{name} is left out with {experts} experts: {type(error).__name__}: {reason[:REASON]}"
        arguments.left_out.append(line)
        trainings.pop(name, None)
        traceback.clear_frames(error.__traceback__)  # they hold memory that the update had allocated
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()

    for name in arguments.candidates:
        display.detail(f"building {name}")
        try:
            trainings[name] = make_training(arguments, experts, data, name, trainings.get("dense"))
        except Exception as error:
            leave_out(name, error)
    trainer = trainings["dense"].trainer
    batches = batches_of(trainer, arguments.updates + WARM_UP)
    calls = {name: lambda number, name=name: trainings[name].update(batches[number]) for name in trainings}
    rate, rate_flops = large_product(arguments)
    calls[RATE] = lambda number: rate()
    rounds = len(batches)

    def tell(done: int) -> None:
        display.advance(done / rounds, f"{done} of {rounds} rounds")

    seconds = {name: times[WARM_UP:] for name, times in in_turn(calls, rounds, tell, leave_out).items()}
    rate_flops /= statistics.median(seconds.pop(RATE))
    tokens, context = batches[0]["ntokens"], batches[0]["net_input"]["src_tokens"].shape[1]
    flops = tokens * flops_of_token(trainer.get_model(), arguments.layers, context)
    held = {name: held_bytes(training) for name, training in trainings.items()}  # before the gradients are released
    rows = []
    for name, times in seconds.items():
        training = trainings[name]
        rows.append(row(experts, tokens, name, times, seconds["dense"]))
        speed = 1 / rows[-1]["seconds"]
        rows[-1]["peak_bytes"] = peak_bytes(training, trainings.values(), batches[0], arguments.device == "cuda")
        rows[-1] |= {"held_bytes": held[name], "state_bytes_planned": training.planned_bytes}
        rows[-1] |= {"updates_per_second": speed, "tokens_per_second": tokens * speed}
        rows[-1] |= {"model_flops_per_second": flops * speed, "rate_flops_per_second": rate_flops}
        rows[-1] |= {"utilisation": flops * speed / rate_flops}
        rows[-1] |= {"parameters": training.parameters, "active": training.active}
        if name == "hash" and "base" in seconds:
            faster = [base / own for base, own in zip(seconds["base"], times, strict=True)]
            spread = Spread.of(faster)
            rows[-1] |= {"over_base": spread.median, "over_base_low": spread.low, "over_base_high": spread.high}
    token_N = torch.cat([batch["net_input"]["src_tokens"].flatten() for batch in batches])
    routed = {name: training for name, training in trainings.items() if name not in PLAIN}
    for batch in [] if arguments.no_decoding else arguments.batch:
        length = arguments.prefix + arguments.steps
        token_BL = token_N.repeat(-(-batch * length // len(token_N)))[: batch * length].view(batch, length)
        times = decode(routed, token_BL, arguments.prefix)
        rows += [row(experts, batch, f"{name} decoding", own, times["dense"]) for name, own in times.items()]
    display.end("done")
    return rows


def parse() -> argparse.Namespace:
    """Return the arguments, checked."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="binarized data (default: the embedded corpus)")
    parser.add_argument("--vocabulary", type=int, default=8000, metavar="V", help="its pieces (default: 8000)")
    parser.add_argument("--experts", type=int, nargs="+", default=[64], metavar="E", help="default: 64")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="default: 4")
    parser.add_argument("--sparse-layers", default="1,3", metavar="N,...", help="layers with experts (default: 1,3)")
    parser.add_argument("--width", type=int, default=512, metavar="D", help="of a token (default: 512)")
    parser.add_argument("--hidden", type=int, default=2048, metavar="F", help="width within an FFN (default: 2048)")
    parser.add_argument("--tokens", type=int, default=4096, metavar="T", help="of an update (default: 4096)")
    parser.add_argument("--updates", type=int, default=11, metavar="N", help="of each that count (default: 11)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="B", help="sentences decoded (default: 1)")
    parser.add_argument("--prefix", type=int, default=32, metavar="N", help="tokens before decoding (default: 32)")
    parser.add_argument("--steps", type=int, default=64, metavar="N", help="of decoding that count (default: 64)")
    parser.add_argument(
        "--candidates",
        nargs="+",
        choices=(*ROUTERS, *PLAIN),
        default=list(ROUTERS),
        help=f"default: {' '.join(ROUTERS)}; dense is always one",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--bf16", action="store_true", help="train in bf16, with fp32 copies of the weights")
    parser.add_argument("--memory-efficient-bf16", action="store_true", help="train in bf16, without these copies")
    parser.add_argument("--optimizer", choices=("adam", "fused_adam"), default="adam", help="fairseq's (default: adam)")
    parser.add_argument("--no-decoding", action="store_true", help="measure updates only")
    parser.add_argument("--threads", type=int, default=usable_cores(), metavar="N", help="default: the usable cores")
    parser.add_argument("--seed", type=int, default=1, help="of weights and batches (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers: fairseq-hash report draws them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write what is printed to a file")
    arguments = parser.parse_args()
    least = {"vocabulary": 300, "seed": 0}
    for name, values in vars(arguments).items():
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, int) and not isinstance(value, bool) and value < least.get(name, 1):
                parser.error(f"--{name} {value} is out of range; give a number of {least.get(name, 1)} or more")
    arguments.bf16 = arguments.bf16 or arguments.memory_efficient_bf16
    most = min(SENTENCE, arguments.tokens)
    if not arguments.no_decoding and arguments.prefix + arguments.steps > most:
        parser.error(f"--prefix and --steps are {arguments.prefix + arguments.steps} tokens; give {most} at most")
    if arguments.width % max(1, arguments.width // HEAD):
        parser.error(f"--width {arguments.width} cannot be cut into attention heads; give a multiple of {HEAD}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; leave it out")
    for name in ("json", "out"):
        path = getattr(arguments, name)
        if path and not path.parent.is_dir():
            parser.error(f"--{name} {path}: the folder {path.parent} does not exist; make it first")
    arguments.candidates = [name for name in (*ROUTERS, *PLAIN) if name == "dense" or name in arguments.candidates]
    return arguments


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the measurement, without output paths."""
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "out", "data")}
    return settings | {"data": arguments.data.name if arguments.data else "embedded"}


def silence() -> None:
    """Suppress fairseq's log and all warnings."""
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")  # there are hundreds, of fairseq and its libraries, which we cannot fix


def data_of(arguments: argparse.Namespace, folder: Path) -> Path:
    """Return the folder of binarized data: --data, or the embedded corpus made in `folder`."""
    if arguments.data is not None:
        return arguments.data
    data = folder / "data"
    make = [sys.executable, "-m", "data_prep", "embedded", "--vocab-size", str(arguments.vocabulary)]
    checkout = Path(__file__).resolve().parent.parent
    made = subprocess.run([*make, "--out", str(data.resolve())], cwd=checkout, capture_output=True, text=True)
    if made.returncode:
        sys.exit(f"{sys.argv[0]}: making the embedded corpus failed: {made.stderr.strip().splitlines()[-1:]}")
    return data


def main() -> None:
    """Measure, print provenance and tables, and write them to files if asked for."""
    arguments = parse()
    settings = settings_of(arguments)
    arguments.left_out = []
    torch.set_num_threads(arguments.threads)
    silence()
    with (
        tempfile.TemporaryDirectory() as folder,
        Display(len(arguments.experts), Console(stderr=True, highlight=False)) as display,
    ):
        data = data_of(arguments, Path(folder))
        try:
            rows = [one for experts in arguments.experts for one in measure(arguments, experts, data, display)]
        except (UserError, FileNotFoundError) as error:
            sys.exit(f"{sys.argv[0]}: {error}")
    facts = provenance()
    lines = ["# Whole trainings", "", "`python benchmarks/train.py`, which defines the columns", ""]
    lines += [f"- {name.replace('_', ' ')}: {str(value).strip('[]')}" for name, value in settings.items()]
    lines += listed(facts)
    lines += [f"- {line}" for line in arguments.left_out] + markdown(rows)
    print("\n".join(lines))
    if arguments.json:
        content = {"benchmark": "train", "provenance": facts, "settings": settings}
        content |= {"left_out": arguments.left_out, "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
