"""Train a small model with every hash function on the same budget; list the perplexities beside the paper's.

    python benchmarks/hash_functions.py DATA --out runs/hash-functions [--larger-dictionary DICT] [--updates 500]

DATA is a folder that `python -m data_prep` made. A dense model is trained first: k-means clusters its embeddings, and
it predicts the next token for the feature `predicted`. A second call continues a stopped one. Every run has one thread,
and `--jobs` of them run at a time. The table is printed and written to RESULT.txt; `fairseq-hash report` takes the
runs' folders.
"""

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import pandas as pd

from fairseq_hash.provenance import provenance

SPARSE = ("--num-experts", "16", "--sparse-layers", "1,3", "--router", "hash")
RANDOM = ("--hash-table", "random")
K2 = ("--experts-per-token", "2", "--hash-weights")
SCATTERED = ("--hash-table", "scattered")
E64 = ("--num-experts", "64")

# Options of the model, by name. {dense} is the dense model's checkpoint, {table} a table file built by BUILT.
MODELS: dict[str, tuple[str, ...]] = {
    "dense": ("--router", "none"),
    "balanced": SPARSE,
    "random": (*SPARSE, *RANDOM),
    "previous token": (*SPARSE, "--hash-feature", "previous"),
    "bigram": (*SPARSE, *RANDOM, "--hash-feature", "bigram"),
    "position": (*SPARSE, *RANDOM, "--hash-feature", "position"),
    "future token (oracle)": (*SPARSE, "--hash-feature", "future"),
    "trigram": (*SPARSE, *RANDOM, "--hash-feature", "ngram", "--hash-length", "3"),
    "history of 3": (*SPARSE, *RANDOM, "--hash-feature", "history", "--hash-length", "3"),
    "balanced, seed 2": (*SPARSE, "--seed", "2"),
    "random, other table": (*SPARSE, *RANDOM, "--hash-seed", "43"),
    "table per layer": (*SPARSE, "--hash-per-layer"),
    "MultiHash 4": (*SPARSE, "--multi-hash", "4"),
    "predicted token": (*SPARSE, "--hash-feature", "predicted", "--hash-predictor", "{dense}"),
    "clusters": (*SPARSE, "--hash-table", "{table}"),
    "dispersed": (*SPARSE, "--hash-table", "{table}"),
    "word": (*SPARSE, "--hash-table", "{table}", "--hash-feature", "word"),
    # More experts, so that some tokens overload one.
    "64 experts, balanced": (*SPARSE, *E64),
    "64 experts, spread": (*SPARSE, *E64, "--hash-table", "{table}"),
    # Twice as many products as the others in two of the four FFNs.
    "2 experts, balanced, learned": (*SPARSE, *K2, "learned"),
    "2 experts, scattered, learned": (*SPARSE, *K2, "learned", *SCATTERED),
    "2 experts, scattered, uniform": (*SPARSE, *K2, "uniform", *SCATTERED),
    "switch": ("--router", "switch", *SPARSE[:4], "--capacity-factor", "1.25", "--router-jitter", "0.01"),
}
BUILT: dict[str, tuple[str, ...]] = {
    "clusters": ("--builder", "clusters", "--embeddings", "{dense}"),
    "dispersed": ("--builder", "dispersed", "--embeddings", "{dense}", "--clusters", "16"),
    "64 experts, spread": ("--builder", "spread", "--text", "{train}", *E64),
    "word": ("--builder", "balanced", "--feature", "word", "--words", "{words}", "--text", "{train}"),
}
# Hash Layers (Roller et al. 2021), 1 x 64 experts, pushshift.io Reddit, valid perplexity: the paper's, not ours.
PAPER = {
    "balanced": 23.16,
    "dispersed": 23.17,
    "random": 23.22,
    "clusters": 23.90,
    "previous token": 24.16,
    "bigram": 24.19,
    "dense": 24.90,
    "position": 25.07,
    "future token (oracle)": 1.97,
}


def train_options(updates: int) -> list[str]:
    """Return the options that all runs share."""
    return [
        *("--task", "language_modeling", "--user-dir", "fairseq_hash", "--cpu", "--num-workers", "0"),
        *("--arch", "hash_transformer_lm_tiny", "--criterion", "hash_moe", "--log-expert-loads", "--seed", "1"),
        *("--tokens-per-sample", "128", "--max-tokens", "4096", "--max-update", str(updates)),
        *("--optimizer", "adam", "--lr", "2e-3", "--clip-norm", "0.1"),
        *("--lr-scheduler", "inverse_sqrt", "--warmup-updates", str(max(1, updates // 10))),
        *("--disable-validation", "--no-epoch-checkpoints", "--log-format", "json"),
        *("--log-interval", str(max(1, updates // 25))),
    ]


def run(command: list[str], log: Path) -> None:
    """Run one command with one thread and its output in a log; end everything if it fails."""
    with log.open("a") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if status:
        raise SystemExit(f"{' '.join(command)} failed; its output is in {log}")


class Comparison:
    """All runs of one call."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.data, self.out, self.updates = arguments.data, arguments.out, arguments.updates
        self.words = arguments.larger_dictionary

    def folder(self, name: str) -> Path:
        """Return the folder of a run."""
        return self.out / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    def filled(self, words: tuple[str, ...], name: str) -> list[str]:
        """Return options with their paths filled in."""
        places = {
            "dense": self.folder("dense") / "checkpoint_last.pt",
            "table": self.folder(name) / "table.safetensors",
            "train": self.data / "train",
            "words": self.words,
        }
        return [word.format(**places) for word in words]

    def make(self, name: str) -> None:
        """Build a model's table, train the model and evaluate it, unless that is done already."""
        folder = self.folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        if "Perplexity" in self.result(name):
            return
        print(f"{datetime.now(timezone.utc):%H:%M:%S}  {name}", flush=True)
        if name in BUILT and not (folder / "table.safetensors").exists():
            command = [sys.executable, "-c", "from fairseq_hash.cli import main; raise SystemExit(main())", "tables"]
            command += ["build", str(self.data / "dict.txt"), *SPARSE[:2], *self.filled(BUILT[name], name)]
            command += ["--out", str(folder / "table.safetensors")]
            run(command, folder / "table.txt")
        train = [sys.executable, "-m", "fairseq_cli.train", str(self.data), *train_options(self.updates)]
        run([*train, *self.filled(MODELS[name], name), "--save-dir", str(folder)], folder / "train.log")
        command = [sys.executable, "-m", "fairseq_cli.eval_lm", str(self.data), "--user-dir", "fairseq_hash", "--cpu"]
        command += ["--path", str(folder / "checkpoint_last.pt"), "--gen-subset", "valid", "--num-workers", "0"]
        command += ["--tokens-per-sample", "128", "--max-tokens", "4096", "--log-format", "json"]
        run(command, folder / "eval-valid.log")

    def result(self, name: str) -> str:
        """Return the output of the evaluation, empty if there is none yet."""
        log = self.folder(name) / "eval-valid.log"
        return log.read_text() if log.exists() else ""

    def table(self, names: list[str]) -> pd.DataFrame:
        """Return the perplexities, in ascending order, beside the paper's."""
        rows = []
        for name in names:
            loads = re.findall(r'"layer\d+_load_max": "?([\d.]+)', (self.folder(name) / "train.log").read_text())
            rows.append(
                {
                    "hash function": name,
                    "valid perplexity": float(re.search(r"Perplexity[^:]*: (\S+)", self.result(name))[1]),
                    "largest load / mean": max(map(float, loads[-2:])) if loads else None,
                    "in the paper (64 experts, Reddit)": PAPER.get(name),
                }
            )
        return pd.DataFrame(rows).sort_values("valid perplexity")


def main() -> None:
    """Run everything that is not done yet, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of binarized data")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--updates", type=int, default=500, help="updates of 4,096 tokens (default: 500)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--larger-dictionary", type=Path, help="dict.txt of more pieces, for `word`")
    parser.add_argument("--only", nargs="+", choices=MODELS, help="some of the hash functions")
    arguments = parser.parse_args()
    names = arguments.only or [name for name in MODELS if name != "word" or arguments.larger_dictionary]
    comparison = Comparison(arguments)
    comparison.make("dense")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(comparison.make, [name for name in names if name != "dense"]))
    told = provenance()
    table = comparison.table(names).to_string(index=False, na_rep="", float_format="{:.2f}".format)
    header = f"{told['date']}, {told['processor']}, torch {told['torch']}, commit {told['commit']}"
    (arguments.out / "RESULT.txt").write_text(f"{header}\n{arguments.updates} updates of 4,096 tokens\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    main()
