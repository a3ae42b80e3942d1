#!/usr/bin/env python3
"""Train dense, Hash, Switch and BASE models of equal compute a token on a small corpus, and compare them on a page.

What is done stays done: a second call goes on where the first was stopped, and repeats a step only where its options,
its data or the code that makes it changed.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo_data import PREPARATION_WORK, ROOT, cut_data, data_fingerprint, prepare_data, shown
from demo_ngrams import beside_ngrams, measure_ngrams
from demo_process import StepFailed
from demo_runs import EVALUATION_WORK, EXPERTS, MODELS, SUBSETS, TOKENS_AN_UPDATE, make_run

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import only_one
from fairseq_hash.core.options import add_options, given_options, option
from fairseq_hash.core.progress import Display
from fairseq_hash.reporting.report import write_report
from fairseq_hash.reporting.runs import load_run

NOTE = """\
These are models of 0.4 to 2.5 million parameters, trained for {updates} updates of 1,024 tokens on one
corpus, {corpus}, with {seeds}. All do the same work for a token: two layers of the same size, and where a layer has
{experts} experts, each token uses one, as large as the dense layer's feed-forward block.

What this can show: that every router trains, resumes, is evaluated and is measured by the same commands; how much more
a model learns in the same updates when it has more parameters for the same work; how evenly each router loads its
experts; and what each costs in tokens per second on this machine.

What it cannot show: which router is best. {noise} The models see one kind of text for minutes, and no option was tuned
for any of them; another learning rate, a larger model or dictionary, longer training or other text can change the
order, and published comparisons do not agree on it. Speed is that of one process on these cores and says nothing about
many GPUs, where routing costs communication.
"""


def _absolute(name: str) -> Path:
    return Path(name).absolute()  # the steps run in another folder


@dataclass(frozen=True)
class Options:
    """What a call of the demo is to do. Raises `UserError` for a value out of range."""

    seeds: int = option(1, "train with seeds 1 to N (default: 1)", metavar="N")
    data: "Path | None" = option(
        None,
        "folder of train.txt, valid.txt and test.txt, or of data from fairseq-preprocess (default: the Python "
        "documentation that every Python brings)",
        type=_absolute,
        metavar="DIR",
    )
    out: Path = option(ROOT / "runs" / "demo", "default: runs/demo", type=_absolute, metavar="DIR")
    updates: int = option(800, "updates of each training, 10 or more (default: 800)", metavar="N")

    def __post_init__(self) -> None:
        for name, least, most in (("seeds", 1, 100), ("updates", 10, 1_000_000)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise UserError(f"--{name} {value} is out of range; give a number from {least} to {most:,}")
        for name, path in (("data", self.data), ("out", self.out)):
            if ":" in str(path):
                raise UserError(f"--{name} {path} has a colon, where fairseq would part it; give a path without one")
        if self.data is not None and not self.data.is_dir():
            raise UserError(f"--data {self.data} is not a folder; give one with train.txt, valid.txt and test.txt")
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is not a folder; give another name")


def parse_options(argv: "Sequence[str] | None") -> Options:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="demo.sh", description=__doc__)
    add_options(parser, Options)
    return given_options(Options, parser.parse_args(argv))


def run_demo(options: Options) -> None:
    """Do all that is not done yet, then write the report."""
    of_one_run = options.updates + EVALUATION_WORK * len(SUBSETS)
    seeds = range(1, options.seeds + 1)
    with Display(PREPARATION_WORK + of_one_run * len(MODELS) * len(seeds)) as display:
        tokens = options.updates * TOKENS_AN_UPDATE
        data = cut_data(prepare_data(options.data, options.out, display), tokens, options.out, display)
        corpus = str(options.data) if options.data else "the Python documentation that Python itself brings"
        fingerprint = {"data": corpus, "data_fingerprint": data_fingerprint(data)}
        folders = [
            make_run(options.out, options.updates, model, seed, data, fingerprint, display)
            for seed in seeds
            for model in MODELS
        ]
    lines = measure_ngrams(data, tokens)
    note = options.out / "note.txt"
    beside = beside_ngrams(lines, [load_run(folder) for folder in folders])
    note.write_text(f"{beside}\n\n{note_text(options, corpus)}", encoding="utf-8")
    write_report(folders, options.out, "Dense, Hash, Switch and BASE on a small corpus", note)
    print((options.out / "results.md").read_text(encoding="utf-8"))
    print(f"The page with all of it: {shown(options.out / 'index.html')}")


def note_text(options: Options, corpus: str) -> str:
    """Return what the page says about the reach of these runs."""
    seeds = "one seed a model" if options.seeds == 1 else f"{options.seeds} seeds a model"
    noise = "One seed a model gives no measure of chance: differences of a few percent may be nothing else (--seeds 3)."
    if options.seeds > 1:
        noise = "The spread over these seeds is given beside each perplexity; a difference within it may be chance."
    return NOTE.format(updates=f"{options.updates:,}", corpus=corpus, seeds=seeds, experts=EXPERTS, noise=noise)


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run the demo; exit status 1 where a step failed or an option is wrong, 130 where it was interrupted."""
    # A plain SIGTERM would leave the child running on its own.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        options = parse_options(argv)
        options.out.mkdir(parents=True, exist_ok=True)
        taken = f"another demo writes to {options.out}; wait for its end or give another --out"
        with only_one(options.out, taken):
            run_demo(options)
    except (UserError, StepFailed) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"demo: {error}; make room or set permissions, then run again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
