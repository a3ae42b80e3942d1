"""`fairseq-hash evaluate`: evaluate trained runs on their validation and test data."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb `evaluate`, and add its arguments."""
    parser.description = (
        "Evaluate the checkpoint of each run by fairseq-eval-lm, with the run's training options. The "
        "output goes to eval-SUBSET.log in the run's folder, where fairseq-hash report finds it. "
        "Finished evaluations are skipped."
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished training")
    add("--subsets", default="valid,test", metavar="LIST", help="subsets, comma separated; default valid,test")
    add("--checkpoint", default="best", choices=("best", "last"), help="checkpoint to evaluate; default best")
    add("--again", action="store_true", help="repeat finished evaluations, too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate one run after another."""
    from fairseq_hash.experiments.evaluate import evaluate_run

    subsets = [name.strip() for name in arguments.subsets.split(",") if name.strip()]
    for folder in arguments.runs:
        evaluate_run(folder, subsets, arguments.checkpoint, arguments.again, print)
