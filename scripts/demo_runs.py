"""The demo's runs: each a training and its evaluations, done once for the same options, data and code."""

import json
import re
import sys
import zipfile
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from demo_data import ROOT, code_fingerprint, short_hash, shown
from demo_process import run_logged

import fairseq_hash
from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import write_json
from fairseq_hash.core.progress import Display
from fairseq_hash.reporting.logs import parse_line, statistics

fairseq_hash.register()

from fairseq_hash.experiments.compose import compose  # noqa: E402 - they import fairseq
from fairseq_hash.experiments.flags import flags  # noqa: E402

EXPERTS = 16
MODELS = ("dense", "hash", "switch", "base")  # experiments of configs/laptop
TOKENS_A_SAMPLE, TOKENS_AN_UPDATE = 64, 1024  # of these experiments
NEVER = 1_000_000_000
SUBSETS = ("valid", "test")
# For the bars only: as many updates of training as take about as long.
EVALUATION_WORK = 20


@dataclass(frozen=True)
class Step:
    """One child process of a run: its name in the record, its command, and its log."""

    name: str
    command: list[str]
    log: Path
    work: float


def train_arguments(updates: int, model: str, seed: int) -> list[str]:
    """Return the options of fairseq-train that make a run what it is: those of a laptop experiment, without places."""
    every = max(1, updates // 6)
    settings = {"optimization.max_update": updates, "lr_scheduler.warmup_updates": min(100, max(1, updates // 10))}
    settings |= {"dataset.validate_interval_updates": every, "checkpoint.save_interval_updates": every}
    settings |= {"dataset.validate_interval": NEVER, "checkpoint.save_interval": NEVER}
    settings |= {"common.seed": seed, "common.log_interval": max(1, updates // 30)}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    words = flags(compose(ROOT / "configs", f"laptop/{model}", overrides).config)[1:]
    place = words.index("--save-dir")
    return words[:place] + words[place + 2 :]


def steps_of(folder: Path, data: Path, arguments: list[str], updates: int) -> list[Step]:
    """Return the steps of a run: training, then one evaluation a subset."""
    python = [sys.executable, "-m"]
    train = [*python, "fairseq_cli.train", shown(data), *arguments, "--save-dir", shown(folder)]
    steps = [Step("train", train, folder / "train.log", updates)]
    for subset in SUBSETS:
        command = [*python, "fairseq_cli.eval_lm", shown(data), "--user-dir", "fairseq_hash", "--cpu"]
        command += ["--path", shown(folder / "checkpoint_best.pt"), "--gen-subset", subset, "--num-workers", "0"]
        command += [
            "--tokens-per-sample",
            str(TOKENS_A_SAMPLE),
            "--max-tokens",
            str(TOKENS_AN_UPDATE),
            "--log-format",
            "json",
        ]
        steps.append(Step(subset, command, folder / f"eval-{subset}.log", EVALUATION_WORK))
    return steps


def make_run(
    out: Path, updates: int, model: str, seed: int, data: Path, corpus: dict[str, str], display: Display
) -> Path:
    """Train and evaluate one model, as far as that is not done; return the run's folder.

    Its record, `run.json`, says which options, data (`corpus`) and code made it, and which steps are done.
    """
    arguments = train_arguments(updates, model, seed)
    code = code_fingerprint(ROOT / "fairseq_hash")
    versions = {name: metadata.version(name) for name in ("torch", "fairseq")}
    identity = {"options": arguments, **corpus, "code": code, "versions": versions}
    folder = out / "runs" / f"{model}-seed{seed}-{short_hash(identity)}"
    record_path = folder / "run.json"
    record: dict[str, Any] = {**identity, "commands": {}, "done": {}}
    if record_path.is_file():
        record = json.loads(record_path.read_text(encoding="utf-8"))
        if any(record.get(key) != value for key, value in identity.items()):
            raise UserError(f"{folder} holds another run; delete it, or give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record_path, record)
    for step in steps_of(folder, data, arguments, updates):
        name = f"{model}, seed {seed}: {'training' if step.name == 'train' else 'evaluation on ' + step.name}"
        if step.name in record["done"]:
            display.skip(name, step.work)
            continue
        training = step.name == "train"
        if training:
            drop_torn_checkpoints(folder, display)
        display.begin(name, step.work)
        watch = Watch(display, updates if training else None)
        run_logged(step.command, step.log, ROOT, watch, append=training)
        if training:
            # Only the best one is evaluated; the others hold the optimizer's state as well.
            for path in [*folder.glob("checkpoint_*_*.pt"), folder / "checkpoint_last.pt"]:
                path.unlink(missing_ok=True)
        display.end(watch.result)
        record["commands"][step.name] = ["python", *step.command[1:]]
        record["done"][step.name] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_json(record_path, record)
    return folder


class Watch:
    """Reads a step's output as it comes and shows how far it is."""

    def __init__(self, display: Display, updates: "int | None") -> None:
        self.display, self.updates, self.result = display, updates, "done"

    def __call__(self, text: str) -> None:
        """Take one line."""
        line = parse_line(text)
        if line is None:
            return
        if line.source == "train_inner" and self.updates:
            values = statistics(line)
            detail = f"update {values['num_updates']:,} of {self.updates:,}, perplexity {values['ppl']:.1f}, "
            self.display.advance(values["num_updates"] / self.updates, f"{detail}{values['wps']:,.0f} tokens/s")
        elif line.source == "valid":
            self.result = f"validation perplexity {statistics(line)['ppl']:.2f}"
        elif found := re.search(r"Perplexity: (\S+)", line.message):
            self.result = f"perplexity {found[1]}"


def drop_torn_checkpoints(folder: Path, display: Display) -> None:
    """Start a training anew where a checkpoint was only half written when the demo was stopped."""
    for path in folder.glob("checkpoint*.pt"):
        try:
            with zipfile.ZipFile(path) as file:
                whole = file.testzip() is None
        except (OSError, zipfile.BadZipFile):
            whole = False
        if not whole:
            display.say(f"{shown(path)} is not whole: this training starts from its beginning")
            for every in folder.glob("checkpoint*.pt"):
                every.unlink()
            return
