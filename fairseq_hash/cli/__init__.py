"""The command `fairseq-hash`: each verb is a module with `add_arguments`, imported when the verb is called."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from fairseq_hash.core.errors import UserError
from fairseq_hash.provenance import __version__

# Verb -> what it does. Its module is `fairseq_hash.cli.VERB`, with an underscore for a hyphen.
VERBS = {
    "data": "prepare text as data for fairseq-train",
    "tables": "build hash tables, judge their balance, exchange them",
    "plan": "show an experiment's sizes and cost, check it, or print it as flags of fairseq-train",
    "evaluate": "evaluate trained runs by fairseq-eval-lm, each with its own data, context and device",
    "ngrams": "compute the perplexity of n-gram models on the same tokens, for comparison",
    "checkpoint": "show, verify, merge, split and average checkpoints",
    "export": "write a model for Hugging Face transformers",
    "sample": "let a model continue a text, and show which expert served each token",
    "experts": "show which experts serve the tokens of a text; of a run, report what its experts do",
    "study": "run a comparison with a protocol: tuned learning rates, seeds, verdicts, n-gram lines",
    "report": "compare runs: tables, learning curves, perplexity by number of experts, expert loads, and a page with "
    "all of them",
    "patches": "list what the plugin changes in fairseq, and whether this fairseq is the known one",
    "user-dir": "print the package's folder, for fairseq's --user-dir",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and the message."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser_for(words: Sequence[str]) -> Parser:
    """Return the parser of a command line: the called verb with its options, the other verbs by name only."""
    parser = Parser(prog="fairseq-hash", description="Tools around fairseq_hash's models.")
    parser.add_argument("--version", action="version", version=f"fairseq-hash {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="VERB")
    called = next((word for word in words if not word.startswith("-")), None)
    for verb, text in VERBS.items():
        of_verb = subparsers.add_parser(verb, help=text)
        if verb == called:
            import_module(f"fairseq_hash.cli.{verb.replace('-', '_')}").add_arguments(of_verb)
    return parser


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run one verb. Returns 0, or 1 after one line on standard error if the input is bad."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        parser = parser_for(words)
        arguments, rest = parser.parse_known_args(words)
        if any(word.startswith("-") for word in rest) or (rest and not hasattr(arguments, "overrides")):
            verb = next(word for word in words if not word.startswith("-"))
            parser.exit(
                2, f"fairseq-hash {verb}: unrecognized arguments: {' '.join(rest)} (see fairseq-hash {verb} --help)\n"
            )
        if rest:  # argparse takes overrides between two options, but not those after a third option
            arguments.overrides += rest
        arguments.run(arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"fairseq-hash: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fairseq-hash: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has gone, as with `| head`; the rest of the output must not fail at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0
