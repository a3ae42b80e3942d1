"""`fairseq-hash data`: prepare text as data for fairseq-train, like `python -m data_prep` in a checkout."""

import argparse
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def preparation() -> ModuleType:
    """Return the module `data_prep.cli`, which is inside an installed package, but beside it in a checkout."""
    package = "fairseq_hash.data_prep" if find_spec("fairseq_hash.data_prep") else "data_prep"
    return import_module(f"{package}.cli")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb `data`, and add its arguments."""
    command = preparation()
    parser.description = command.DESCRIPTION
    command.add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Prepare the data. Exits with 130 if it was interrupted."""
    command = preparation()
    try:
        command.run(arguments)
    except KeyboardInterrupt:
        print(f"fairseq-hash: {command.INTERRUPTED}", file=sys.stderr)
        sys.exit(130)
