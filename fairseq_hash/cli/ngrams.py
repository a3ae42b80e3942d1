"""`fairseq-hash ngrams`: the perplexity of n-gram models on the tokens on which language models are evaluated."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import check_file, output_file

if TYPE_CHECKING:
    from fairseq_hash.experiments.ngrams import Line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb `ngrams`, and add its arguments."""
    parser.description = (
        "Count n-grams of 1, 2, 3 (or more) tokens in DATA's training text, smooth them by interpolated modified "
        "Kneser-Ney (Chen and Goodman 1999), and evaluate them on every token that fairseq-eval-lm predicts."
    )
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="folder that fairseq-preprocess or data_prep wrote")
    add("--tokens", type=int, metavar="N", help="count the first N tokens of train; default all")
    add("--subset", nargs="+", default=["valid"], metavar="NAME", help="subsets to evaluate on; default valid")
    add("--order", type=int, default=3, metavar="N", help="tokens of the longest n-grams, 1 to 6; default 3")
    add("--json", type=Path, metavar="FILE", help="also write the figures and their provenance")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Read, count, evaluate, and print the table."""
    from rich.console import Console

    from fairseq_hash.core.progress import Display
    from fairseq_hash.experiments.ngrams import LONGEST, check_size, ngram_lines, read_stream
    from fairseq_hash.hashing.dictionary import read_dictionary
    from fairseq_hash.table_tools.count_keys import reading
    from fairseq_hash.table_tools.token_streams import open_text

    data, limit = arguments.data, arguments.tokens
    if limit is not None and limit < 1:
        raise UserError(f"--tokens is {limit}; give the number of tokens of train to count, 1 or more")
    if not 1 <= arguments.order <= LONGEST:
        raise UserError(f"--order {arguments.order} is out of range; give a number from 1 to {LONGEST}")
    if not data.is_dir():
        raise UserError(f"{data} is no folder; give one that fairseq-preprocess or data_prep wrote")
    check_file("--json", arguments.json)
    symbols, _ = read_dictionary(data / "dict.txt")
    check_size(len(symbols), arguments.order)
    texts = {
        subset: open_text(data, subset, symbols) for subset in ("train", *arguments.subset)
    }  # raises if one is missing
    held_out = {}
    for subset in dict.fromkeys(arguments.subset):
        with reading(texts[subset]) as blocks:
            held_out[subset] = read_stream(blocks)
    with reading(texts["train"]) as blocks:
        training_S = read_stream(blocks, limit)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if limit is not None and len(training_S) < limit:
        console.print(f"note: train has {len(training_S):,} tokens, fewer than --tokens {limit:,}; all are counted")
    orders = range(1, arguments.order + 1)
    with Display(len(orders), console) as display:
        lines = ngram_lines(training_S, held_out, len(symbols), orders, display)
    print_lines(lines)
    if arguments.json is not None:
        write_json(arguments.json, data, symbols, lines)
        print(f"wrote {arguments.json}")


def print_lines(lines: "list[Line]") -> None:
    """Print the table, and a line for each order whose discounts could not be estimated."""
    print(f"{'subset':<10}{'order':>6}{'perplexity':>14}{'nats/token':>12}{'tokens':>13}{'training tokens':>17}")
    for line in lines:
        print(
            f"{line.subset:<10}{line.order:>6}{line.perplexity:>14,.2f}{line.nats:>12.4f}{line.tokens:>13,}"
            f"{line.training_tokens:>17,}"
        )
    # The discounts are the same for each subset. The counts of lower orders depend on the highest order.
    missing = {
        (line.order, order)
        for line in lines
        for order, discounts in enumerate(line.discounts, 1)
        if not discounts.estimated
    }
    for model, order in sorted(missing):
        print(
            f"note: in the model of order {model} too few n-grams of order {order} were seen 1 to 4 times to estimate "
            "their discounts; 0.5, 1 and 1.5 are taken"
        )


def write_json(path: Path, data: Path, symbols: list[str], lines: "list[Line]") -> None:
    """Write the lines with their provenance.

    Raises:
        UserError: if the file cannot be written.
    """
    from dataclasses import asdict

    from fairseq_hash.hashing import dictionary_fingerprint
    from fairseq_hash.provenance import provenance

    record = {
        "model": "interpolated modified Kneser-Ney",
        "data": str(data),
        "vocabulary": len(symbols),
        "dictionary_fingerprint": dictionary_fingerprint(symbols),
        "lines": [asdict(line) for line in lines],
        "provenance": provenance(),
    }
    with output_file(path) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")
