#!/usr/bin/env python3
"""Whole trainings beside one another: updates a second, memory, and decoding token by token, by router.

    python benchmarks/train.py [--data DIR] [--experts E ...] [--layers N] [--tokens T] [--json FILE] [--out FILE]

Task, model, criterion and trainer are fairseq's, built as `fairseq-train` builds them, in one process. In every round
each candidate takes one update with the same batch, the candidates in turn, and another begins each round. An update is
all of `Trainer.train_step`: forward, backward, clipping, Adam, statistics. All candidates do the same products for a
token; they differ in the FFNs of `--sparse-layers`.

- dense: plain FFNs.
- hash: a balanced hash table on the tokens.
- switch: capacity factor 1.25 and jitter 0.01, as published.
- base: a balanced assignment of every batch.

Times are medians (quartiles) over the rounds. Ratios are taken within a round: `/ dense`, and `hash / BASE`, the
updates a second of hash over those of BASE, for which Hash Layers (Roller et al. 2021) reports 1.11.

`peak MB` (10^6 bytes) is what one update holds at most: the candidate's own weights, buffers and optimizer state, and
what its update allocates on top, gradients included. On a GPU the allocator counts it; on a CPU it is the rise of the
process's peak resident memory, which Linux alone can reset. All candidates of one number of experts stay in
memory together: about 16 bytes a parameter in fp32, those of all experts counted.

Decoding: with some tokens before, every step gives the model's decoder one more token of each sentence, with fairseq's
incremental state, in evaluation. Ratios are taken within a step.
"""

import argparse
import contextlib
import itertools
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rounds import Spread, reset_peak, resident

from fairseq_hash.cli import Parser
from fairseq_hash.errors import UserError
from fairseq_hash.progress import Display
from fairseq_hash.provenance import provenance, usable_cores

CANDIDATES = {
    "dense": ("--router", "none"),
    "hash": ("--router", "hash"),
    "switch": ("--router", "switch", "--capacity-factor", "1.25", "--router-jitter", "0.01"),
    "base": ("--router", "base"),
}
WARM_UP = 2  # rounds: the first one allocates gradients and Adam's state
SENTENCE = 512  # tokens, where an update has as many
HEAD = 64  # width of an attention head, where the model is as wide


def trainer_options(arguments: argparse.Namespace, experts: int, data: Path, candidate: str) -> list[str]:
    """Return the options that `fairseq-train` would get."""
    values = {
        **{"task": "language_modeling", "user-dir": Path(__file__).parents[1] / "fairseq_hash"},
        **{"arch": "hash_transformer_lm_tiny", "criterion": "hash_moe", "seed": arguments.seed},
        **{"decoder-layers": arguments.layers, "decoder-embed-dim": arguments.width},
        **{"decoder-ffn-embed-dim": arguments.hidden, "decoder-attention-heads": max(1, arguments.width // HEAD)},
        **{"tokens-per-sample": min(SENTENCE, arguments.tokens), "max-tokens": arguments.tokens},
        "required-batch-size-multiple": 1,
        **{"optimizer": "adam", "lr": "1e-4", "clip-norm": "0.1", "num-workers": 0},
        **{"distributed-world-size": 1, "save-dir": data},
    }
    if candidate != "dense":
        values |= {"num-experts": experts, "sparse-layers": arguments.sparse_layers}
    words = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    flags = [*(["--cpu"] if arguments.device == "cpu" else []), *(["--bf16"] if arguments.bf16 else [])]
    return [str(data), *words, *CANDIDATES[candidate], *flags, "--no-save"]


def build(words: Sequence[str]) -> Any:
    """Return the trainer for options of `fairseq-train`, as fairseq_cli/train.py makes it."""
    from fairseq import options, tasks, utils
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.trainer import Trainer

    arguments = options.parse_args_and_arch(options.get_training_parser(), list(words))
    configuration = convert_namespace_to_omegaconf(arguments)
    utils.set_torch_seed(configuration.common.seed)
    task = tasks.setup_task(configuration.task)
    model, criterion = task.build_model(configuration.model), task.build_criterion(configuration.criterion)
    trainer = Trainer(configuration, task, model, criterion)
    trainer.model, trainer.optimizer  # noqa: B018  (both are made when they are first asked for)
    return trainer


def batches_of(trainer: Any, count: int) -> list[Any]:
    """Return so many full batches of the training data, from the first again where there are fewer."""
    # All but the last sentence are of one length, so one batch at most is smaller than the others.
    batches = list(itertools.islice(trainer.get_train_iterator(1).next_epoch_itr(), count + 1))
    most = max(batch["ntokens"] for batch in batches)
    full = [batch for batch in batches if batch["ntokens"] == most]
    return [full[number % len(full)] for number in range(count)]


def update(trainer: Any, batch: Any) -> float:
    """Return the seconds of one update."""
    from fairseq.logging import metrics

    metrics.reset()  # candidates have loads of other numbers of experts
    with metrics.aggregate(new_root=True):
        return seconds_of(lambda: trainer.train_step([batch]))


def seconds_of(call: Callable[[], Any]) -> float:
    """Return the seconds of a call, all of it on the device included."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else contextlib.nullcontext
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def in_turn(calls: dict[str, Callable[[int], float]], rounds: int, tell: Callable[[int], None]) -> dict[str, list]:
    """Return the seconds of each candidate's calls by round, another candidate first in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(calls[name](number))
        tell(number + 1)
    return seconds


def peak_bytes(trainer: Any, others: Sequence[Any], batch: Any) -> "int | None":
    """Return the most bytes that a candidate has in an update: its own, and what the update adds; None if unknown."""
    for other in others:
        other.zero_grad()
    state = trainer.optimizer.optimizer.state.values()
    own = [*trainer.model.parameters(), *trainer.model.buffers()]
    own += [value for values in state for value in values.values() if isinstance(value, torch.Tensor)]
    own += [copy for group in trainer.optimizer.param_groups for copy in group["params"]]  # in fp32, with --bf16
    own += [tensor.grad for tensor in own if tensor.grad is not None]
    held = sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in own}.values())
    if trainer.cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with mock.patch("torch.cuda.reset_peak_memory_stats"):  # the trainer does it at the end of an update
            update(trainer, batch)
        return held + torch.cuda.max_memory_allocated() - before
    if not reset_peak():
        return None
    before = resident("VmRSS")
    update(trainer, batch)
    return held + resident("VmHWM") - before


@torch.no_grad()
def decode(trainers: dict[str, Any], token_BL: torch.Tensor, before: int) -> dict[str, list]:
    """Return the seconds of each candidate's steps, the tokens of `token_BL` after the first `before` one by one."""
    states: dict[str, dict[str, Any]] = {name: {} for name in trainers}
    decoders = {name: trainer.model.eval().decoder for name, trainer in trainers.items()}
    token_BL = token_BL.to(next(iter(trainers.values())).device)

    def step(name: str, length: int) -> float:
        return seconds_of(lambda: decoders[name](token_BL[:, :length], incremental_state=states[name]))

    for length in range(1, before + 1):  # fairseq's decoder takes one token a call
        for name in trainers:
            step(name, length)
    calls = {name: lambda number, name=name: step(name, before + 1 + number) for name in trainers}
    return in_turn(calls, token_BL.shape[1] - before, lambda number: None)


def row(experts: int, tokens: int, candidate: str, seconds: list[float], dense: list[float]) -> dict[str, Any]:
    """Return what stands in the JSON file of one candidate: median, quartiles, and the ratio within rounds."""
    ratio = statistics.median(one / other for one, other in zip(seconds, dense, strict=True))
    shape = {"experts": experts, "tokens": tokens, "candidate": candidate}
    return {**shape, **Spread.of(seconds).as_seconds(), "ratio": ratio, "peak_bytes": None}


def measure(arguments: argparse.Namespace, experts: int, data: Path, display: Display) -> list[dict[str, Any]]:
    """Return the rows of one number of experts."""
    from fairseq_hash.model import count_parameters

    display.begin(f"{experts} experts", 1)
    trainers = {}
    for name in arguments.candidates:
        display.detail(f"building {name}")
        trainers[name] = build(trainer_options(arguments, experts, data, name))
    batches = batches_of(trainers["dense"], arguments.updates + WARM_UP)
    calls = {
        name: lambda number, trainer=trainer: update(trainer, batches[number]) for name, trainer in trainers.items()
    }
    rounds = len(batches)
    seconds = in_turn(calls, rounds, lambda number: display.advance(number / rounds, f"{number} of {rounds} rounds"))
    seconds = {name: times[WARM_UP:] for name, times in seconds.items()}
    tokens = batches[0]["ntokens"]
    rows = []
    for name, times in seconds.items():
        rows.append(row(experts, tokens, name, times, seconds["dense"]))
        rows[-1]["peak_bytes"] = peak_bytes(trainers[name], trainers.values(), batches[0])
        rows[-1] |= {"updates_per_second": 1 / rows[-1]["seconds"], "tokens_per_second": tokens / rows[-1]["seconds"]}
        rows[-1] |= dict(zip(("parameters", "active"), count_parameters(trainers[name].get_model()), strict=True))
        if name == "hash" and "base" in seconds:
            faster = [base / own for base, own in zip(seconds["base"], times, strict=True)]
            spread = Spread.of(faster)
            rows[-1] |= {"over_base": spread.median, "over_base_low": spread.low, "over_base_high": spread.high}
    token_N = torch.cat([batch["net_input"]["src_tokens"].flatten() for batch in batches])
    for batch in arguments.batch:
        length = arguments.prefix + arguments.steps
        token_BL = token_N.repeat(-(-batch * length // len(token_N)))[: batch * length].view(batch, length)
        times = decode(trainers, token_BL, arguments.prefix)
        rows += [row(experts, batch, f"{name} decoding", own, times["dense"]) for name, own in times.items()]
    display.end("done")
    return rows


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Return both tables as lines."""
    heading = ("experts", "candidate", "ms an update", "updates/s", "tokens/s", "/ dense", "hash / BASE", "peak MB")
    lines = ["", table_line((*heading, "parameters", "active")), "|---|---|" + "---:|" * (len(heading))]
    for one in (one for one in rows if "updates_per_second" in one):
        faster = "{over_base:.2f} ({over_base_low:.2f} to {over_base_high:.2f})" if "over_base" in one else ""
        memory = "" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 1e6:,.0f}"
        cells = [
            f"{one['updates_per_second']:.3g}",
            f"{one['tokens_per_second']:,.0f}",
            f"{one['ratio']:.2f}",
            faster.format(**one),
        ]
        cells += [memory, f"{one['parameters']:,}", f"{one['active']:,}"]
        lines.append(table_line((str(one["experts"]), one["candidate"], text(one, 1000, ".1f"), *cells)))
    lines += ["", "| experts | sentences | candidate | ms a step | / dense |", "|---|---|---|---:|---:|"]
    for one in (one for one in rows if "updates_per_second" not in one):
        cells = (str(one["experts"]), str(one["tokens"]), one["candidate"], text(one, 1000, ".2f"))
        lines.append(table_line((*cells, f"{one['ratio']:.2f}")))
    return lines


def table_line(cells: Sequence[str]) -> str:
    """Return one row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def text(one: dict[str, Any], factor: float, digits: str) -> str:
    """Return median and quartiles of what `Spread.as_seconds` made, in other units."""
    return Spread(one["seconds"], one["low"], one["high"]).text(factor, digits)


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
        choices=CANDIDATES,
        default=list(CANDIDATES),
        help="default: all; dense is always one",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--bf16", action="store_true", help="train in bf16, with fp32 copies of the weights")
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
    most = min(SENTENCE, arguments.tokens)
    if arguments.prefix + arguments.steps > most:
        parser.error(f"--prefix and --steps are {arguments.prefix + arguments.steps} tokens; give {most} at most")
    if arguments.width % max(1, arguments.width // HEAD):
        parser.error(f"--width {arguments.width} cannot be cut into attention heads; give a multiple of {HEAD}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; leave it out")
    for name in ("json", "out"):
        path = getattr(arguments, name)
        if path and not path.parent.is_dir():
            parser.error(f"--{name} {path}: the folder {path.parent} does not exist; make it first")
    arguments.candidates = [name for name in CANDIDATES if name == "dense" or name in arguments.candidates]
    return arguments


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured, without where it is written to."""
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "out", "data")}
    return settings | {"data": arguments.data.name if arguments.data else "embedded"}


def main() -> None:
    """Measure, print provenance and tables, and write them to files where it is asked for."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")  # hundreds of fairseq's and its libraries', which we cannot mend
    with (
        tempfile.TemporaryDirectory() as folder,
        Display(len(arguments.experts), Console(stderr=True, highlight=False)) as display,
    ):
        data = arguments.data
        if data is None:
            data = Path(folder, "data")
            make = [sys.executable, "-m", "data_prep", "embedded", "--vocab-size", str(arguments.vocabulary)]
            made = subprocess.run([*make, "--out", str(data)], capture_output=True, text=True)
            if made.returncode:
                sys.exit(f"{sys.argv[0]}: making the embedded corpus failed: {made.stderr.strip().splitlines()[-1:]}")
        try:
            rows = [one for experts in arguments.experts for one in measure(arguments, experts, data, display)]
        except (UserError, FileNotFoundError) as error:
            sys.exit(f"{sys.argv[0]}: {error}")
    settings, facts = settings_of(arguments), provenance()
    lines = ["# Whole trainings", "", "`python benchmarks/train.py`, which defines the columns", ""]
    lines += [f"- {name.replace('_', ' ')}: {str(value).strip('[]')}" for name, value in settings.items()]
    lines += [f"- {name}: {value}" for name, value in facts.items() if value]
    lines += markdown(rows)
    print("\n".join(lines))
    if arguments.json:
        content = {"benchmark": "train", "provenance": facts, "settings": settings, "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
