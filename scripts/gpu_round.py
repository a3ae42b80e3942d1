#!/usr/bin/env python3
"""The GPU round: stage after stage, each with a time limit of its own, results written as they come (docs/gpu.md).

    python scripts/gpu_round.py OUT [--device cpu|cuda] [--stages NAME ...] [--seconds S]

A stage that fails or is cut off never ends the others. `summary.txt` has at most 60 lines; what every stage printed
is in `logs.tar.gz`.
"""

import argparse
import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from gpu_prepare import STUDY, records_of_study

from fairseq_hash.cli import Parser
from fairseq_hash.core.files import atomic_write
from fairseq_hash.provenance import provenance, usable_cores

ROOT = Path(__file__).resolve().parent.parent
PREPARED = ROOT / ".gpu"
SECONDS = 530  # of the whole round
MOST_LINES = 60
LEAST_SECONDS = 10  # with less, a process is not begun
GRACE_SECONDS = 5  # between an interrupt and the end
COMMAND = "import sys; from fairseq_hash.cli import main; sys.exit(main(sys.argv[1:]))"
SMALL_STUDY = """
title: One training
question: Does a study run here?
limits: It shows nothing else.
text: {name: small, pieces: 300, train_tokens: 512, valid_tokens: 256, test_tokens: 256}
baseline: Hash
learning_rates: [1.0e-3]
seeds: [1]
validations: 1
models:
  Hash:
    experiment: laptop/hash
    overrides: [
      model.decoder_embed_dim=32, model.decoder_ffn_embed_dim=64, model.decoder_attention_heads=2,
      model.num_experts=4, task.tokens_per_sample=32, dataset.max_tokens=128
    ]
"""


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: as `--stages` takes it.
        seconds: its limit; the last stage also gets what the others have left.
        commands: the words of one Python process after the other.
        tables: the files whose tables go into the summary.
        lines: how many of their lines at most.
        is_fixed: whether the limit is the caller's: then it holds for the last stage, too.
    """

    name: str
    seconds: int
    commands: tuple[tuple[str, ...], ...]
    tables: tuple[str, ...] = ()
    lines: int = 12
    is_fixed: bool = False


def stages_on_cuda(out: Path, scratch: Path, data: str) -> list[Stage]:
    """Return the round for one GPU, the most important first."""
    workers = str(min(14, usable_cores()))
    # The order of tests/gpu/conftest.py, not xdist's: files of many tests are not those that take long.
    tests = pytest_of("cuda", "-n", workers, "--maxprocesses", workers, "--no-loadscope-reorder", "--durations", "12")
    layer = ("benchmarks/layer.py", "--device", "cuda", "--width", "1024", "--hidden", "4096", "--rounds", "5")
    sizes = ("--layers", "8", "--width", "1024", "--hidden", "4096", "--sparse-layers", "7", "--experts", "64")
    training = ("--data", data, "--device", "cuda", "--bf16", *sizes, "--tokens", "16384", "--no-decoding")
    training += ("--optimizer", "fused_adam")
    bf16 = (*layer, "--dtype", "bfloat16", "--tokens", "16384", "--experts", "8", "64", "128", "256")
    bf16 += ("--graphs", "--candidates", "dense", "hash", "switch", "mask-and-loop", "transformers")
    bf16 += files(out, scratch, "layer")
    fp16 = (*layer, "--dtype", "float16", "--tokens", "16384", "--experts", "64", "--candidates", "dense", "hash")
    fp16 += ("--ways", "loop", "padded", *files(scratch, scratch, "layer_fp16"))
    # fairscale takes fp32 only, and its products grow with the square of the tokens.
    fp32 = (*layer, "--tokens", "4096", "--experts", "64", "--candidates", "dense", "hash", "fairscale")
    fp32 += ("--ways", "loop", "padded", *files(scratch, scratch, "layer_fp32"))
    train = ("benchmarks/train.py", *training, "--updates", "15", "--candidates", "dense", "plain")
    trained = (*train, "hash", "switch", "base", *files(out, scratch, "train"))
    compiled = (*train, "compiled", *files(scratch, scratch, "train_compiled"))  # apart, because it takes long to begin
    profiled = ("benchmarks/profile_step.py", *training, "--traces", str(scratch), *files(out, scratch, "profile"))
    dry = ("benchmarks/dry_run_time.py", "--device", "cuda", "--out", str(scratch / "dry_run.md"))
    at_once = str(max(1, usable_cores() * 3 // 4))
    # No run of this folder goes on later, so none needs the optimizer's state.
    leaner = ("dataset.num_workers=0", "checkpoint.no_save_optimizer_state=true")
    study = study_of(STUDY, PREPARED / "study", scratch, "--jobs", at_once, "--override", *leaner)
    return [
        Stage("correct", 100, (tests,)),
        Stage("layer", 90, (bf16, fp16, fp32), ("layer.md", "layer_fp16.md", "layer_fp32.md"), 22),
        Stage("training", 90, (trained, compiled), ("train.md", "train_compiled.md"), 9),
        Stage("profile", 45, (profiled,), ("profile.md",), 6),
        Stage("dry_run", 75, (dry,), ("dry_run.md",), 5),
        Stage("study", 130, (study,), (f"records/{STUDY}/results.md",), 8),
    ]


def stages_on_cpu(out: Path, scratch: Path, data: str) -> list[Stage]:
    """Return the same round, small: it shows that every stage runs."""
    sizes = ("--layers", "2", "--width", "64", "--hidden", "64", "--sparse-layers", "1", "--experts", "4")
    training = ("--data", data, *sizes, "--tokens", "128", "--no-decoding", "--updates", "2", "--candidates", "hash")
    layer = ("benchmarks/layer.py", "--width", "16", "--hidden", "32", "--tokens", "64", "--experts", "4")
    layer += ("--rounds", "2", "--threads", "1", "--candidates", "dense", "hash", *files(out, scratch, "layer"))
    trained = ("benchmarks/train.py", *training, "plain", *files(out, scratch, "train"))
    profiled = ("benchmarks/profile_step.py", *training, *files(out, scratch, "profile"))
    dry = ("benchmarks/dry_run_time.py", "--updates", "2", "--models", "dense", "--out", str(scratch / "dry_run.md"))
    part = ("-m", "data_prep", "cut", data, "--train-tokens", "512", "--valid-tokens", "256", "--test-tokens", "256")
    part += ("--out", str(scratch / "part"))
    (scratch / "small.yaml").write_text(SMALL_STUDY, encoding="utf-8")
    study = study_of(str(scratch / "small.yaml"), scratch / "part", scratch)
    return [
        Stage("correct", 100, (pytest_of("cpu", "-n", "0", "-k", "assignment or two_ranks"),)),
        Stage("layer", 60, (layer,), ("layer.md",)),
        Stage("training", 180, (trained,), ("train.md",)),
        Stage("profile", 60, (profiled,), ("profile.md",), 6),
        Stage("dry_run", 90, (dry,), ("dry_run.md",), 7),
        Stage("study", 120, (part, study), ("records/small/results.md",)),
    ]


def pytest_of(device: str, *words: str) -> tuple[str, ...]:
    """Return the words of the tests for a device."""
    return ("-m", "pytest", "-m", "gpu", "--tb=short", "tests/gpu", "--gpu-device", device, "-q", *words)


def files(out: Path, scratch: Path, name: str) -> tuple[str, ...]:
    """Return the options with which a benchmark writes its figures, and what it prints beside the logs."""
    return "--json", str(out / f"{name}.json"), "--out", str(scratch / f"{name}.md")


def study_of(name: str, data: Path, scratch: Path, *words: str) -> tuple[str, ...]:
    """Return the words of a study; it goes on from the records that the project has."""
    stem = Path(name).stem
    places = ("--data", str(data), "--work", str(scratch / "study"), "--records", str(scratch / "records" / stem))
    return ("-c", COMMAND, "study", name, *places, *words)


def run_stage(stage: Stage, seconds: float, log: Path) -> str:
    """Run a stage for so long at most; return how it ended."""
    start = time.monotonic()
    ends = []
    with open(log, "wb") as file:
        for command in stage.commands:
            left = seconds - (time.monotonic() - start)
            ends.append(run_process(command, left, file) if left > LEAST_SECONDS else "not begun")
    return f"{', '.join(ends)}; {time.monotonic() - start:.0f} of {seconds:.0f} s"


def run_process(command: Sequence[str], seconds: float, log: BinaryIO) -> str:
    """Run a Python process for so long at most; return how it ended."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    to_log = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, **to_log)
    try:
        return f"status {process.wait(seconds - GRACE_SECONDS)}"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it may still say what it knows
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        return "cut off"
    finally:
        # Whatever it has started ends with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_lines(log: Path, count: int) -> list[str]:
    """Return the last lines of a log that say something."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.strip()[:200] for line in lines if line.strip()][-count:]


def told(stage: Stage, scratch: Path) -> list[str]:
    """Return the lines of a stage for the summary: its tables, or the end of its log."""
    log = scratch / f"{stage.name}.log"
    if stage.name == "correct":
        failed = [line for line in last_lines(log, 400) if re.match(r"(FAILED|ERROR) ", line)]
        return [*failed[:10], *last_lines(log, 1)]
    found = [scratch / name for name in stage.tables if (scratch / name).is_file()]
    rows = [row for path in found for row in table_rows(path)]
    return rows[: stage.lines] or last_lines(log, 4)


def table_rows(path: Path) -> list[str]:
    """Return the rows of a file's first table, of a study's that of its results, and what was left out or failed."""
    text = path.read_text(encoding="utf-8")
    lines = (text.partition("## Results\n")[2] or text).splitlines()
    notes = [line for line in lines if re.match(r"- .*( is left out| at \S+: )", line)]
    first = next((place for place, line in enumerate(lines) if line.startswith("|")), len(lines))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first:])
    return [line[:200] for line in (*rows, *notes) if not line.startswith("|---")]


def chosen(stages: Sequence[Stage], names: "Sequence[str] | None") -> list[Stage]:
    """Return the stages that `--stages` names, with their limits; all of them without it."""
    if names is None:
        return list(stages)
    known = {stage.name: stage for stage in stages}
    found = []
    for name, _, seconds in (word.partition(":") for word in names):
        if name not in known or not (seconds.isdigit() or not seconds):
            sys.exit(f"gpu_round: --stages {name}:{seconds}: give NAME or NAME:SECONDS; there are {', '.join(known)}")
        fixed = {"seconds": int(seconds), "is_fixed": True} if seconds else {}
        found.append(replace(known[name], **fixed))
    return found


def limit_of(stage: Stage, is_last: bool, left: float) -> float:
    """Return how many seconds a stage gets, where so many are left of the round."""
    return left if is_last and not stage.is_fixed else min(stage.seconds, left)


def figures_of(stage: Stage, out: Path) -> list[Path]:
    """Return the files of figures that a stage writes into the folder of results."""
    words = (word for command in stage.commands for word in command)
    return [Path(word) for word in words if word.endswith(".json") and Path(word).parent == out]


def keep_logs(out: Path, scratch: Path) -> None:
    """Write all logs so far, the whole file or the one before."""
    with atomic_write(out / "logs.tar.gz") as partial, tarfile.open(partial, "w:gz") as archive:
        for path in sorted(scratch.rglob("*")):
            is_log = path.suffix in (".log", ".txt", ".md", ".json", ".yaml", ".gz")
            if is_log and path.is_file() and path.stat().st_size < 8_000_000:
                archive.add(path, path.relative_to(scratch))


def write_summary(out: Path, lines: Sequence[str]) -> None:
    """Write the summary so far."""
    (out / "summary.txt").write_text("\n".join(lines) + "\n")


def parse() -> argparse.Namespace:
    """Return the arguments, checked."""
    parser = Parser(prog="gpu_round.sh", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder for the results, made where missing")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the same round, small")
    add("--data", type=Path, default=PREPARED / "data", metavar="DIR", help="binarized text (default: .gpu/data)")
    add("--stages", nargs="+", metavar="NAME[:S]", help="only these (default: all), each for S seconds at most")
    add("--seconds", type=int, default=SECONDS, help=f"of the whole round (default: {SECONDS})")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu runs the same round small")
    if not (arguments.data / "dict.txt").is_file():
        parser.error(f"{arguments.data} holds no binarized text; run bash scripts/gpu_round.sh --prepare first")
    return arguments


def main() -> None:
    """Run the stages and print the summary."""
    arguments = parse()
    start = time.monotonic()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu round ") as folder:
        scratch = Path(folder)
        make = stages_on_cuda if arguments.device == "cuda" else stages_on_cpu
        if records_of_study().is_dir():
            shutil.copytree(records_of_study(), scratch / "records" / STUDY, ignore=shutil.ignore_patterns("results*"))
        stages = make(out, scratch, str(arguments.data.resolve()))
        stages = chosen(stages, arguments.stages)
        about = provenance()
        summary = [", ".join(f"{key} {value}" for key, value in about.items() if value and key != "platform")]
        for stage in stages:
            left = arguments.seconds - (time.monotonic() - start)
            seconds = limit_of(stage, stage is stages[-1], left)
            if seconds < LEAST_SECONDS:
                summary.append(f"{stage.name}: not begun, no time was left")
                continue
            print(f"gpu_round: {stage.name}, at most {seconds:.0f} s", file=sys.stderr, flush=True)
            log = scratch / f"{stage.name}.log"
            for path in figures_of(stage, out):  # of an earlier round
                path.unlink(missing_ok=True)
            summary.append(f"{stage.name}: {run_stage(stage, seconds, log)}")
            summary += told(stage, scratch)
            write_summary(out, summary[:MOST_LINES])
            keep_logs(out, scratch)
        write_summary(out, [*summary[: MOST_LINES - 1], f"in all {time.monotonic() - start:.0f} s"])
    print((out / "summary.txt").read_text(), end="")


if __name__ == "__main__":
    main()
