"""`fairseq-hash report`: tables, figures and a page from the logs of runs or the files of benchmarks."""

import argparse
import functools
import math
import sys
from pathlib import Path

TITLE = "Sparse language models compared"
BENCHMARKS_TITLE = "Sparse layers and trainings measured"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb `report`, and add its arguments."""
    parser.description = (
        "Compare runs by their own logs. Runs that differ only in their seed are averaged. Runs that are "
        "incomplete, or that were evaluated differently from the others, are left out; stderr and the "
        "page give the reason. With --benchmarks: show the results of benchmarks as tables and figures."
    )
    add = parser.add_argument
    add(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="folder of a run, or a folder with run folders at any depth below it; a run folder holds the output of "
        "fairseq-train (with --log-format json) or of fairseq-hydra-train, and the outputs of fairseq-eval-lm, each in "
        "a file that ends in .log or .out",
    )
    files = "files that benchmarks/layer.py, train.py and communication.py wrote with --json, instead of runs"
    add("--benchmarks", nargs="+", type=Path, metavar="FILE", help=files)
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write to; created if missing")
    add("--title", help=f"heading of the report (default: {TITLE}; of benchmarks: {BENCHMARKS_TITLE})")
    add("--note", type=Path, metavar="FILE", help="text for the report: what these runs can show")
    add(
        "--watch",
        nargs="?",
        const="30",
        metavar="SECONDS",
        help="keep index.html current while runs train: write a new page every so many seconds (default 30, at least "
        "1); the page reloads itself; Ctrl-C ends it. When the runs are done, write the report without --watch",
    )
    parser.set_defaults(run=functools.partial(run, parser))


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Write the report and print its files."""
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
        parser.error(f"--watch {arguments.watch} is not a number of seconds; give 1 or more, or nothing for 30")
    from fairseq_hash.reporting.report import read_note
    from fairseq_hash.reporting.watching import watch

    tell = functools.partial(print, flush=True)
    watch(arguments.runs, arguments.out, arguments.title or TITLE, read_note(arguments.note), seconds, tell)
