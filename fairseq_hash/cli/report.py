"""`fairseq-hash report`: from the logs of runs, or from the files of benchmarks, to tables, figures and a page."""

import argparse
import functools
from pathlib import Path

TITLE = "Sparse language models compared"
BENCHMARKS_TITLE = "Sparse layers and trainings measured"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb `report`."""
    parser = subparsers.add_parser(
        "report",
        description="Compare runs by their own logs. Runs that differ in their seed only are averaged; runs that are "
        "incomplete or were evaluated otherwise than the others are listed with the reason and left out. With "
        "--benchmarks: show what benchmarks measured.",
    )
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="folder of a run, or a folder with run folders at any depth below it; a run folder holds the output of "
        "fairseq-train (with --log-format json) or of fairseq-hydra-train, and the outputs of fairseq-eval-lm, each in "
        "a file that ends in .log or .out",
    )
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="in place of runs: what benchmarks/layer.py, train.py and communication.py wrote with --json",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to, made where missing")
    parser.add_argument("--title", help=f"heading of the page (default: {TITLE}; of benchmarks: {BENCHMARKS_TITLE})")
    parser.add_argument("--note", type=Path, metavar="FILE", help="text for the page: what these runs can show")
    parser.set_defaults(run=functools.partial(run, parser))


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Write the report and say where it is."""
    if not arguments.runs and not arguments.benchmarks:
        parser.error("the following arguments are required: RUN or --benchmarks FILE")
    if arguments.runs and arguments.benchmarks:
        parser.error("RUN does not go with --benchmarks; write two reports")
    if arguments.benchmarks:
        from fairseq_hash.reporting.benchmarks import write_benchmarks

        title = arguments.title or BENCHMARKS_TITLE
        paths = write_benchmarks(arguments.benchmarks, arguments.out, title, arguments.note)
    else:
        from fairseq_hash.reporting.report import write_report

        paths = write_report(arguments.runs, arguments.out, arguments.title or TITLE, arguments.note)
    for path in paths:
        print(f"wrote {path}")
