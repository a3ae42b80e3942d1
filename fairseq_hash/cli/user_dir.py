"""`fairseq-hash user-dir`: print the package's folder, for fairseq's `--user-dir`."""

import argparse
from pathlib import Path

import fairseq_hash
from fairseq_hash.experiments.names import own_configs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb `user-dir`, and add its arguments."""
    parser.description = (
        'Print the package\'s folder: fairseq-train --user-dir "$(fairseq-hash user-dir)" works anywhere.'
    )
    configs = 'print the folder of its configurations: --config-dir "$(fairseq-hash user-dir --configs)"'
    parser.add_argument("--configs", action="store_true", help=configs)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the folder."""
    print(own_configs() if arguments.configs else Path(fairseq_hash.__file__).parent)
