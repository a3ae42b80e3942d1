"""The command `fairseq-hash`: each verb is a module with `add_parser`."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from fairseq_hash.cli import checkpoint, evaluate, ngrams, plan, report, tables
from fairseq_hash.errors import UserError
from fairseq_hash.provenance import __version__

VERBS = (tables, plan, evaluate, ngrams, checkpoint, report)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and the message."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run one verb. Returns 0, or 1 after one line on standard error where the input is bad."""
    parser = Parser(prog="fairseq-hash", description="Tools around fairseq_hash's models.")
    parser.add_argument("--version", action="version", version=f"fairseq-hash {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="VERB")
    for verb in VERBS:
        verb.add_parser(subparsers)
    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes those between two options, but not those after a third
        arguments.overrides += rest
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"fairseq-hash: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fairseq-hash: interrupted", file=sys.stderr)
        return 130
    return 0
