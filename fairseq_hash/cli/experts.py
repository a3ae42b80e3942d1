"""`fairseq-hash experts`: which experts serve the tokens of a text; of a run, what its experts do."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from fairseq_hash.cli.experts_of_run import TOKENS, report_run
from fairseq_hash.cli.sample import add_model, check_checkpoint, load_model
from fairseq_hash.cli.texts import read_text
from fairseq_hash.core.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from fairseq_hash.api import LanguageModel

SEPARATORS = {".tsv": "\t", ".csv": ","}
EXAMPLES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb `experts`, and add its arguments."""
    parser.description = (
        "Of a checkpoint: show which experts serve the tokens of a text, one line for each token, sparse layer and "
        "expert, with tabs between the columns. A long text is cut into blocks as evaluation cuts it. Of a run's "
        "folder: report what its experts do, that is, which tokens each serves, how they differ, and how far the "
        "routes follow token ids, over the run's checkpoints."
    )
    add = parser.add_argument
    add_model(parser, "checkpoint of a language model, or the folder of a run")
    add("text", nargs="?", metavar="TEXT", help="file of text, UTF-8; - reads standard input (default: the run's data)")
    add("--tokens-per-sample", type=int, metavar="N", help="tokens of a block (default: those of the training)")
    add("--out", type=Path, metavar="OUT", help="write to FILE.tsv or FILE.csv instead; of a run, files to this folder")
    of_file = parser.add_argument_group("of a checkpoint")
    of_file.add_argument(
        "--summary", action="store_true", help="one line for each layer and expert: tokens, share, frequent tokens"
    )
    of_file.add_argument("--overwrite", action="store_true", help="replace FILE")
    of_run = parser.add_argument_group("of a run")
    of_run.add_argument("--checkpoint", dest="which", choices=("best", "last"), help="which one to use (default: best)")
    of_run.add_argument("--subset", metavar="NAME", help="subset of the run's data to read (default: valid)")
    of_run.add_argument("--tokens", type=int, metavar="N", help=f"tokens to read at most (default: {TOKENS:,})")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Read the text, load the model, and write the routes; or write the report on a run."""
    if arguments.checkpoint.is_dir():
        _refuse(arguments, ("summary", "overwrite"), f"{arguments.checkpoint} is a folder, and", "a checkpoint")
        report_run(arguments)
        return
    check_checkpoint(arguments.checkpoint)
    _refuse(arguments, ("which", "subset", "tokens"), f"{arguments.checkpoint} is a file, and", "the folder of a run")
    if arguments.text is None:
        raise UserError(f"no TEXT for {arguments.checkpoint}; give a file of text, or - for standard input")
    show_routes(arguments)


def _refuse(arguments: argparse.Namespace, names: Sequence[str], given: str, needs: str) -> None:
    for name in names:
        if getattr(arguments, name):
            option = "checkpoint" if name == "which" else name
            raise UserError(f"{given} --{option} needs {needs}; leave it out")


def show_routes(arguments: argparse.Namespace) -> None:
    """Show which experts of a checkpoint serve the tokens of a text."""
    from fairseq_hash.core.files import check_out, output_file

    out = arguments.out
    if out is not None:
        if out.suffix not in SEPARATORS:
            raise UserError(f"--out {out} has an unknown ending; give a name that ends in {' or '.join(SEPARATORS)}")
        check_out(out, arguments.overwrite)
    text = read_text(arguments.text)

    model = load_model(arguments)
    if not model.num_experts:
        raise UserError(f"{arguments.checkpoint} has no experts; give a checkpoint of a model with --sparse-layers")
    blocks = blocks_of(model, text, arguments.tokens_per_sample)
    tables = iter([summary(model, blocks)]) if arguments.summary else blocks
    if out is None:
        try:
            write_tables(tables, sys.stdout, "\t")
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` is no error; Python flushes once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return

    with output_file(out) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        write_tables(tables, file, SEPARATORS[out.suffix])
    print(f"wrote {out}")


def blocks_of(model: "LanguageModel", text: str, length: "int | None") -> "Iterator[pd.DataFrame]":
    """Return the routes of a text, block by block. Positions count from the start of the whole text.

    The text is cut into blocks as in `fairseq-eval-lm`: the first token of a block does not see the block before.

    Raises:
        UserError: if the length of a block is out of range.
    """
    import torch

    from fairseq_hash.api.route_counts import sample_length

    length = sample_length(model, length)
    read = torch.cat([torch.tensor([model.start]), model.tokenize(text)])
    return (model.routes_read(read[at : at + length], at) for at in range(0, len(read), length))


def summary(model: "LanguageModel", blocks: "Iterator[pd.DataFrame]") -> "pd.DataFrame":
    """Return tokens, share and most frequent tokens of each expert in each layer; experts without tokens, too."""
    import pandas as pd

    counts = pd.concat([block.groupby(["layer", "router", "expert", "token"]).size() for block in blocks])
    counts = counts.groupby(level=[0, 1, 2, 3]).sum().rename("tokens").reset_index()
    lines = []
    for (layer, router), of_layer in counts.groupby(["layer", "router"]):
        for expert in range(model.num_experts):
            served = of_layer[of_layer["expert"] == expert].sort_values("tokens", ascending=False, kind="stable")
            tokens = int(served["tokens"].sum())
            examples = " ".join(served["token"].head(EXAMPLES))
            lines.append((layer, router, expert, tokens, tokens / of_layer["tokens"].sum(), examples))
    return pd.DataFrame(lines, columns=["layer", "router", "expert", "tokens", "share", "examples"])


def write_tables(tables: "Iterator[pd.DataFrame]", file: TextIO, separator: str) -> None:
    """Write tables below each other, under one header line."""
    for number, table in enumerate(tables):
        table.to_csv(file, sep=separator, index=False, header=number == 0, float_format="%.6g", lineterminator="\n")
