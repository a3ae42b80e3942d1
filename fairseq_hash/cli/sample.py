"""`fairseq-hash sample`: continue a text, and show which expert served each token."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import check_file, output_file
from fairseq_hash.core.options import add_options, given_options
from fairseq_hash.options.sampling_options import Sampling

if TYPE_CHECKING:
    from fairseq_hash.api import LanguageModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb `sample`, and add its arguments."""
    parser.description = (
        "Continue TEXT by fairseq's generator. Each next token is drawn at random unless --beam is given."
    )
    add = parser.add_argument
    add_model(parser)
    add("text", nargs="?", metavar="TEXT", help="one line to continue (default: begin a line)")
    add_options(parser, Sampling)
    add("--show-experts", action="store_true", help="also show which expert served each token, for each sparse layer")
    add("--html", type=Path, metavar="FILE", help="also write a page that shows the experts; replaces FILE")
    parser.set_defaults(run=run)


def add_model(parser: argparse.ArgumentParser, what: str = "checkpoint of a language model") -> None:
    """Add the options for loading a checkpoint; `what` can be given as one."""
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CKPT", help=what)
    folder = "folder of its dict.txt (default: its training's data folder, or the checkpoint's own folder)"
    add("--data", type=Path, metavar="DIR", help=folder)
    add("--sentencepiece", type=Path, metavar="FILE", help="its SentencePiece model (default: beside dict.txt)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    add("--map-experts", action="store_true", help="leave the experts in the checkpoint's files: for large models")
    predictor = "the predicting model of --hash-feature predicted, if its file was moved"
    add("--hash-predictor", type=Path, metavar="CKPT", help=predictor)


def check_checkpoint(path: Path) -> None:
    """Raise `UserError` if the file does not exist, before importing torch, which takes seconds."""
    if not path.exists() and ":/" not in str(path):  # for addresses, the error of loading says what to do
        raise UserError(f"{path} does not exist; give the file of a checkpoint")


def load_model(arguments: argparse.Namespace) -> "LanguageModel":
    """Load the checkpoint of a command line that `add_model` has read."""
    check_checkpoint(arguments.checkpoint)
    from fairseq_hash.api import load

    given = arguments
    return load(
        given.checkpoint, given.data, given.sentencepiece, given.device, given.map_experts, given.hash_predictor
    )


def run(arguments: argparse.Namespace) -> None:
    """Load the model, sample from it, and show the samples."""
    if arguments.text is not None and not arguments.text.strip():
        raise UserError("TEXT is empty; give some words, or leave it out to begin a line")
    check_file("--html", arguments.html)
    check_checkpoint(arguments.checkpoint)

    from rich.console import Console
    from rich.text import Text

    from fairseq_hash.api.routed_text import by_layer, page, print_text

    sampling = given_options(Sampling, arguments)
    model = load_model(arguments)
    shows = arguments.show_experts or arguments.html is not None
    if shows and not model.num_experts:
        raise UserError(f"{arguments.checkpoint} has no experts to show; leave out --show-experts and --html")
    samples = model.sample(arguments.text, sampling)
    console = Console(highlight=False, soft_wrap=True)
    pages = []
    for number, sample in enumerate(samples):
        if number:
            console.print()
        console.print(Text(sample.text))
        if not shows:
            continue
        routes = model.routes(sample.tokens)
        pages.append((routes, sample.given))
        if arguments.show_experts:
            for layer, router, tokens in by_layer(routes, sample.given):
                console.print(f"layer {layer}, {router}", style="bold")
                print_text(console, tokens)
    if arguments.html is not None:
        title = f"Experts of {arguments.checkpoint.name}"
        html = page(title, f"{arguments.checkpoint}, seed {arguments.seed}", pages)
        with output_file(arguments.html) as partial:
            partial.write_text(html, encoding="utf-8")
        console.print(Text(f"wrote {arguments.html}"))
