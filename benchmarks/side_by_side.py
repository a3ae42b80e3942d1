#!/usr/bin/env python3
"""The models of `configs/one_gpu` side by side on one device: perplexity beside that of n-gram models, in a given time.

    python benchmarks/side_by_side.py --data DIR --runs DIR [--ngrams FILE] [--seconds S] [--out FILE] [--json FILE]

All models train at the same time, each in a process of its own by `fairseq-hydra-train`, on the same batches in the
same order, at one learning rate (or at --rates-at-a-time): a wave. The next wave, at the next learning rates, begins if
the remaining time is enough for a wave as long as the last. No token is seen twice (`optimization.max_epoch` is 1). At
the end the best checkpoint of each model, by its valid perplexity, is evaluated on the test text.

What this shows: valid perplexity of each model at each learning rate, one seed. The models share the device, so their
speeds mean nothing. A model whose best rate is the lowest or the highest one is not tuned: the table marks it.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from fairseq_hash.cli import Parser
from fairseq_hash.core.errors import UserError
from fairseq_hash.experiments.evaluate import evaluation_command
from fairseq_hash.provenance import provenance, usable_cores
from fairseq_hash.reporting.logs import read_evaluations, read_lines
from fairseq_hash.reporting.runs import load_run

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("dense", "hash", "switch", "base")
# No weights are kept for a resumption, and there is no validation before the end.
SHORT = ("checkpoint.no_save_optimizer_state=true", "checkpoint.save_interval_updates=0")
SHORT += ("dataset.validate_interval_updates=0", "common.log_interval=50")
NGRAMS = {1: "unigram", 2: "bigram", 3: "trigram"}
EVALUATION = 20
"""Seconds kept for the test text at the end."""
SLACK = 1.15
"""Factor by which a wave may take longer than the last one."""


def environment(processes: int) -> dict[str, str]:
    """Return the environment of one of `number` processes that share the cores."""
    threads = str(max(1, usable_cores() // processes))
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}


def run_together(
    commands: "dict[Hashable, list[str]]", logs: "dict[Hashable, Path]", until: float
) -> "dict[Hashable, str]":
    """Run commands at the same time, until a time of `time.monotonic`; return the reason for each one that failed."""
    processes = {}
    for name, command in commands.items():
        with open(logs[name], "wb") as file:
            processes[name] = subprocess.Popen(
                command, cwd=ROOT, env=environment(len(commands)), stdout=file, stderr=subprocess.STDOUT
            )
    failed = {}
    for name, process in processes.items():
        try:
            status = process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            failed[name] = "no end in time"
            continue
        if status:
            last = logs[name].read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            failed[name] = f"status {status}: {' '.join(last)[:200]}"
    return failed


def train_wave(arguments: argparse.Namespace, rates: Sequence[str], until: float) -> list[dict[str, Any]]:
    """Train all models at some learning rates; return one row for each training."""
    commands, logs, folders = {}, {}, {}
    for one in itertools.product(arguments.models, rates):
        model, rate = one
        folders[one] = arguments.runs / f"{model}-lr{rate}"
        folders[one].mkdir(parents=True, exist_ok=True)
        logs[one] = folders[one] / "output.txt"
        commands[one] = [sys.executable, "-m", "fairseq_cli.hydra_train", "--config-dir", str(ROOT / "configs")]
        commands[one] += ["--config-name", f"one_gpu/{model}", f"task.data={arguments.data.resolve()}", *SHORT]
        commands[one] += [f"hydra.run.dir={folders[one].resolve()}", f"optimization.lr=[{rate}]"]
        commands[one] += [f"common.seed={arguments.seed}", *arguments.overrides]
    failed = run_together(commands, logs, until)
    rows = []
    for one, folder in folders.items():
        row = {"model": one[0], "rate": one[1], "folder": folder.name, "failed": failed.get(one)}
        if one not in failed:
            log = load_run(folder).training
            last = log.validations[max(log.validations)]
            row |= {"updates": log.updates, "valid": last["ppl"], "peak_gb": last.get("peak_gb")}
            row["tokens"] = log.updates * log.config["dataset.max_tokens"] * log.config["optimization.update_freq"][0]
        rows.append(row)
    return rows


def evaluate(arguments: argparse.Namespace, rows: list[dict[str, Any]], until: float) -> None:
    """Add `test`, the perplexity of the test text, to the best row of each model."""
    best = {}
    for row in rows:
        if row.get("valid") is not None and row["valid"] < best.get(row["model"], row)["valid"] + 1e-9:
            best[row["model"]] = row
    commands, logs = {}, {}
    for model, row in best.items():
        folder = arguments.runs / row["folder"]
        logs[model] = folder / "eval-test.log"
        commands[model] = evaluation_command(load_run(folder), folder / "checkpoint_best.pt", "test")
    failed = run_together(commands, logs, until)
    for model, row in best.items():
        found = [] if model in failed else read_evaluations(read_lines(logs[model]))
        row["test"] = found[-1].perplexity if found else None
        row["test_failed"] = failed.get(model)
        row["is_best"] = True
        row["is_at_the_edge"] = row["rate"] in edges(rows)


def edges(rows: list[dict[str, Any]]) -> set[str]:
    """Return the lowest and the highest learning rate."""
    rates = sorted({row["rate"] for row in rows}, key=float)
    return {rates[0], rates[-1]}


def markdown(rows: list[dict[str, Any]], ngrams: "dict[str, Any] | None") -> list[str]:
    """Return the table of all rows by valid perplexity, the n-gram lines among them."""
    lines = [(row["valid"], row) for row in rows if row.get("valid") is not None]
    cells = []
    for perplexity, row in lines:
        test = "" if row.get("test") is None else f"{row['test']:.2f}"
        edge = " (an edge: not tuned)" if row.get("is_at_the_edge") else ""
        best = f"best{edge}" if row.get("is_best") else ""
        cells.append((perplexity, row["model"], row["rate"], test, f"{row['tokens']:,}", best))
    counted = {(one["subset"], one["order"]): one for one in (ngrams or {}).get("lines", ())}
    for (subset, order), one in counted.items():
        if subset == "valid":
            test = f"{counted['test', order]['perplexity']:.2f}" if ("test", order) in counted else ""
            tokens = f"{one['training_tokens']:,}"
            cells.append((one["perplexity"], NGRAMS.get(order, f"{order}-gram"), "", test, tokens, "counts"))
    text = ["| model | learning rate | valid perplexity | test | tokens | |", "|---|---:|---:|---:|---:|---|"]
    for perplexity, model, rate, test, tokens, note in sorted(cells):
        text.append(f"| {model} | {rate} | {perplexity:.2f} | {test} | {tokens} | {note} |")
    text += [f"- {row['model']} at {row['rate']}: {row['failed']}" for row in rows if row["failed"]]
    text += [f"- {row['model']} at {row['rate']}: test: {row['test_failed']}" for row in rows if row.get("test_failed")]
    return text


def parse() -> argparse.Namespace:
    """Return the arguments, checked."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="binarized data")
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="folder for the runs")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help="of configs/one_gpu")
    parser.add_argument("--rates", nargs="+", default=["2e-3", "4e-3", "1e-3"], metavar="LR", help="a wave each")
    parser.add_argument("--rates-at-a-time", type=int, default=1, metavar="N", help="in one wave (default: 1)")
    parser.add_argument("--ngrams", type=Path, metavar="FILE", help="what fairseq-hash ngrams wrote with --json")
    parser.add_argument("--seconds", type=float, default=150.0, help="in all (default: 150)")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, after each wave")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write what is printed to a file")
    parser.add_argument("--overrides", nargs="+", default=[], metavar="KEY=VALUE", help="of every configuration")
    arguments = parser.parse_args()
    for model in arguments.models:
        if not (ROOT / "configs" / "one_gpu" / f"{model}.yaml").is_file():
            parser.error(f"--models {model}: configs/one_gpu has no {model}.yaml")
    if arguments.seconds <= EVALUATION:
        parser.error(
            f"--seconds {arguments.seconds:g} is out of range; give more than the {EVALUATION} of the evaluation"
        )
    if arguments.rates_at_a_time < 1:
        parser.error(f"--rates-at-a-time {arguments.rates_at_a_time} is out of range; give a number of 1 or more")
    if not (arguments.data / "dict.txt").is_file():
        parser.error(f"--data {arguments.data} holds no binarized data; make it with python -m data_prep")
    if arguments.ngrams and not arguments.ngrams.is_file():
        parser.error(f"--ngrams {arguments.ngrams} does not exist; leave it out, or write it with fairseq-hash ngrams")
    for name in ("json", "out"):
        path = getattr(arguments, name)
        if path and not path.parent.is_dir():
            parser.error(f"--{name} {path}: the folder {path.parent} does not exist; make it first")
    for model, rate in itertools.product(arguments.models, arguments.rates):
        if (arguments.runs / f"{model}-lr{rate}").exists():  # fairseq would continue from its weights
            parser.error(f"--runs {arguments.runs} already holds {model}-lr{rate}; give another folder, or delete it")
    return arguments


def main() -> None:
    """Train wave after wave, evaluate, and write after each step."""
    arguments = parse()
    start = time.monotonic()
    end = start + arguments.seconds
    trained = end - EVALUATION
    ngrams = json.loads(arguments.ngrams.read_text()) if arguments.ngrams else None
    rows: list[dict[str, Any]] = []
    settings = {"data": arguments.data.name, "seed": arguments.seed, "overrides": arguments.overrides}

    def write() -> list[str]:
        record = {"benchmark": "side_by_side", "provenance": provenance(), "settings": settings, "rows": rows}
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1) + "\n")
        text = markdown(rows, ngrams)
        if arguments.out:
            arguments.out.write_text("\n".join(text) + "\n")
        return text

    longest = 0.0
    count = arguments.rates_at_a_time
    for first in range(0, len(arguments.rates), count):
        wave = arguments.rates[first : first + count]
        began = time.monotonic()
        if rows and began + SLACK * longest > trained:
            break
        try:
            rows += train_wave(arguments, wave, trained)
        except UserError as error:
            sys.exit(f"side_by_side: {error}")
        longest = max(longest, time.monotonic() - began)
        print(f"learning rates {' '.join(wave)}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        write()
    evaluate(arguments, rows, end)
    print("\n".join(write()))
    if all(row["failed"] for row in rows):
        sys.exit("side_by_side: every model failed")


if __name__ == "__main__":
    main()
