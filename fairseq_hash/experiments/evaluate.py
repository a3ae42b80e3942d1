"""Evaluate trained runs by `fairseq-eval-lm`, each with its training options."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import fairseq_hash
from fairseq_hash.core.errors import UserError
from fairseq_hash.reporting.runs import Run, load_run


def evaluation_command(run: Run, checkpoint: Path, subset: str) -> list[str]:
    """Return the command that evaluates a run's checkpoint with the run's own data, context, batch and device."""
    config = run.training.config
    command = [sys.executable, "-m", "fairseq_cli.eval_lm", config["task.data"]]
    command += ["--user-dir", str(Path(fairseq_hash.__file__).parent), "--path", str(checkpoint)]
    command += ["--gen-subset", subset, "--tokens-per-sample", str(config["task.tokens_per_sample"])]
    command += ["--sample-break-mode", str(config["task.sample_break_mode"])]
    command += ["--max-tokens", str(config["dataset.max_tokens"]), "--log-format", "json", "--num-workers", "0"]
    return [*command, *(["--cpu"] if config["common.cpu"] else [])]


def evaluate_run(folder: Path, subsets: Sequence[str], which: str, again: bool, tell: Callable[[str], None]) -> None:
    """Evaluate one run on each subset; the output goes to `eval-SUBSET.log` in its folder.

    `which` is the checkpoint, best or last; `again`: repeat evaluations that were made after the training's end; `tell`
    is called with a line for each step. Raises `UserError` if the run is not complete, its checkpoint is missing, or an
    evaluation fails.
    """
    run = load_run(folder)
    if run.not_done:
        raise UserError(f"{folder} cannot be evaluated: {run.not_done}")
    checkpoint = folder / f"checkpoint_{which}.pt"
    if not checkpoint.is_file():
        raise UserError(f"{folder} has no {checkpoint.name}; train it, or evaluate another (--checkpoint)")
    for subset in subsets:
        known = run.evaluations.get(subset)
        if known is not None and Path(known.checkpoint).name == checkpoint.name and not again:
            tell(f"{folder} {subset}: perplexity {known.perplexity:.2f}, as evaluated before")
            continue
        log = folder / f"eval-{subset}.log"
        _run(evaluation_command(run, checkpoint, subset), log)
        evaluated = load_run(folder)
        done = evaluated.evaluations.get(subset)
        if done is None:
            raise UserError(f"{log} is no result: it {evaluated.faults.get(subset, 'tells of no evaluation')}")
        tell(f"{folder} {subset}: perplexity {done.perplexity:.2f}")


def _run(command: Sequence[str], log: Path) -> None:
    """Run a command with its output in a file. The file gets its final name when the command has succeeded."""
    partial = log.with_name(f"{log.name}.partial")
    with open(partial, "wb") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        last = partial.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise UserError(f"fairseq-eval-lm failed with status {status}: {' '.join(last)} (all of it: {partial})")
    os.replace(partial, log)
