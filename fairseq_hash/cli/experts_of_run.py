"""`fairseq-hash experts RUN`: the report on the experts of a run."""

import argparse
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fairseq_hash.cli.texts import read_text
from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import check_folder
from fairseq_hash.core.validators import check_at_least

if TYPE_CHECKING:
    import numpy as np

    from fairseq_hash.api import LanguageModel

TOKENS = 50_000  # of a text, unless the command line says otherwise


def report_run(arguments: argparse.Namespace) -> None:
    """Make the report of a run's folder, print it, and write it to `--out`.

    Raises:
        UserError: if an option is out of range or in vain, the run is dense or has no checkpoint, or the text cannot
            be used.
    """
    if arguments.tokens is None:
        arguments.tokens = TOKENS
    check_at_least("--tokens", arguments.tokens, 1)
    if arguments.out is not None:
        check_folder(arguments.out)
    if arguments.text is not None and arguments.subset is not None and not Path(arguments.text).is_dir():
        raise UserError(f"--subset {arguments.subset} is of a data folder, and TEXT is {arguments.text}; leave one out")

    from rich.console import Console

    from fairseq_hash.api import load
    from fairseq_hash.expert_report.checkpoints import checkpoint_of
    from fairseq_hash.expert_report.page import print_report, write
    from fairseq_hash.expert_report.report import make_report

    given = arguments
    options = (given.data, given.sentencepiece, given.device, given.map_experts, given.hash_predictor)
    report = make_report(
        given.checkpoint,
        checkpoint_of(given.checkpoint, given.which or "best"),
        lambda path: load(path, *options),
        functools.partial(text_of, given),
        given.tokens_per_sample,
        functools.partial(print, file=sys.stderr),
    )
    paths = [] if given.out is None else write(report, given.out)
    print_report(report, Console(highlight=False, width=None if sys.stdout.isatty() else 200))
    for path in paths:
        print(f"wrote {path}")


def text_of(arguments: argparse.Namespace, model: "LanguageModel") -> "tuple[str, np.ndarray]":
    """Return the name of the text to read and its first tokens, int64 `[S]`: plain text, or a subset of data.

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    import numpy as np

    from fairseq_hash.table_tools.token_streams import open_text

    text, subset = arguments.text, arguments.subset or "valid"
    if text is not None and not Path(text).is_dir():
        token_S = model.tokenize(read_text(text)).numpy()
        return "standard input" if text == "-" else str(text), token_S[: arguments.tokens]
    folder = Path(text or arguments.data or model.configuration.task.data)
    found, count = [], 0
    for block in open_text(folder, subset, model.dictionary.symbols).blocks():
        found.append(block)
        count += len(block)
        if count >= arguments.tokens:
            break
    return f"{folder}/{subset}", np.concatenate(found)[: arguments.tokens]
