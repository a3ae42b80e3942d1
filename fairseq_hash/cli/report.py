"""`fairseq-hash report`: from the logs of runs to a table, figures and a page."""

import argparse
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb `report`."""
    parser = subparsers.add_parser(
        "report",
        help="compare runs: tables, learning curves, perplexity by experts, expert loads, and a page with all of it",
        description="Compare runs by their own logs. Runs that differ in their seed only are averaged; runs that are "
        "incomplete or were evaluated otherwise than the others are listed with the reason and left out.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of a run, or a folder with run folders at any depth below it; a run folder holds the output of "
        "fairseq-train (with --log-format json) or of fairseq-hydra-train, and the outputs of fairseq-eval-lm, each in "
        "a file that ends in .log or .out",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to, made where missing")
    parser.add_argument("--title", default="Sparse language models compared", help="heading of the page")
    parser.add_argument("--note", type=Path, metavar="FILE", help="text for the page: what these runs can show")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the report and say where it is."""
    from fairseq_hash.reporting.report import write_report

    for path in write_report(arguments.runs, arguments.out, arguments.title, arguments.note):
        print(f"wrote {path}")
