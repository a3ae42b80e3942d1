"""`fairseq-hash report`: from the logs of runs, or from the files of benchmarks, to tables, figures and a page."""

import argparse
import functools
import math
import sys
from pathlib import Path

TITLE = "Sparse language models compared"
BENCHMARKS_TITLE = "Sparse layers and trainings measured"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb `report`."""
    parser = subparsers.add_parser(
        "report",
        description="Compare runs by their own logs. Runs that differ in their seed only are averaged; runs that are "
        "incomplete or were evaluated otherwise than the others are left out, which stderr and the page say with the "
        "reason. With --benchmarks: show what benchmarks measured.",
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
    parser.add_argument(
        "--watch",
        nargs="?",
        const="30",
        metavar="SECONDS",
        help="keep index.html current while runs train, a new page after so many seconds (30, or 1 and more); the page "
        "reloads itself; Ctrl-C ends it. Write the report without --watch when the runs are done",
    )
    parser.set_defaults(run=functools.partial(run, parser))


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Write the report and say where it is."""
    if not arguments.runs and not arguments.benchmarks:
        parser.error("the following arguments are required: RUN or --benchmarks FILE")
    if arguments.runs and arguments.benchmarks:
        parser.error("RUN does not go with --benchmarks; write two reports")
    if arguments.watch is not None:
        _watch(parser, arguments)
        return
    if arguments.benchmarks:
        from fairseq_hash.reporting.benchmarks import write_benchmarks

        title = arguments.title or BENCHMARKS_TITLE
        paths = write_benchmarks(arguments.benchmarks, arguments.out, title, arguments.note)
    else:
        from fairseq_hash.reporting.comparison import compare
        from fairseq_hash.reporting.report import read_note, write_comparison

        comparison = compare(arguments.runs, arguments.title or TITLE, read_note(arguments.note))
        paths = write_comparison(comparison, arguments.out)
        print("\n".join(comparison.summary), file=sys.stderr)
    for path in paths:
        print(f"wrote {path}")


def _watch(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.benchmarks:
        parser.error("--watch does not go with --benchmarks, whose files do not grow; leave it out")
    try:
        seconds = float(arguments.watch)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds < math.inf:
        parser.error(f"--watch {arguments.watch} is no time to wait; give 1 or more seconds, or none for 30")
    from fairseq_hash.reporting.report import read_note
    from fairseq_hash.reporting.watching import watch

    tell = functools.partial(print, flush=True)
    watch(arguments.runs, arguments.out, arguments.title or TITLE, read_note(arguments.note), seconds, tell)
