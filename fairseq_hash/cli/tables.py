"""`fairseq-hash tables`: build hash tables from a dictionary, and show how evenly a table loads the experts."""

import argparse
from pathlib import Path

from fairseq_hash.errors import UserError


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb `tables` with its own verbs `build` and `show`."""
    tables = subparsers.add_parser("tables", help="build hash tables and judge their balance")
    verbs = tables.add_subparsers(dest="tables_verb", required=True, metavar="VERB")
    build = verbs.add_parser("build", help="build a table for a dictionary and write it to a file")
    build.add_argument("dictionary", type=Path, metavar="DICT", help="dict.txt of the data, with token counts")
    build.add_argument("--builder", choices=("balanced", "random"), default="balanced", help="how (default: balanced)")
    build.add_argument("--num-experts", type=int, required=True, metavar="E", help="number of experts, 1 or more")
    build.add_argument("--seed", type=int, default=42, help="seed of the random builder, 0 or more (default: 42)")
    build.add_argument("--out", type=Path, required=True, metavar="FILE", help="table file to write (safetensors)")
    build.set_defaults(run=run_build)
    show = verbs.add_parser("show", help="show a table's load on the counts of a dictionary")
    show.add_argument("table", type=Path, metavar="FILE", help="table file")
    show.add_argument("dictionary", type=Path, metavar="DICT", help="dict.txt with the counts to judge it on")
    show.set_defaults(run=run_show)


def run_build(arguments: argparse.Namespace) -> None:
    """Build and write a table, then show it."""
    from safetensors import SafetensorError

    from fairseq_hash.hashing import build_table, save_table

    if arguments.num_experts < 1:
        raise UserError(f"--num-experts {arguments.num_experts} is out of range; give a number of 1 or more")
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed} is out of range; give a number of 0 or more")
    if not arguments.out.parent.is_dir():
        raise UserError(f"--out {arguments.out}: the folder {arguments.out.parent} does not exist; make it first")
    symbols, counts = read_dictionary(arguments.dictionary)
    table = build_table(arguments.builder, symbols, counts, arguments.num_experts, arguments.seed)
    try:
        save_table(table, arguments.out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write --out {arguments.out} ({error}); give a file that you can write") from None
    print(f"wrote {arguments.out}")
    show_load(table, counts)


def run_show(arguments: argparse.Namespace) -> None:
    """Show a table's record and its load."""
    from fairseq_hash.hashing import dictionary_fingerprint, load_table

    table = load_table(arguments.table)
    symbols, counts = read_dictionary(arguments.dictionary)
    if table.record.dictionary_fingerprint != dictionary_fingerprint(symbols):
        raise UserError(f"{arguments.table} was built for another dictionary than {arguments.dictionary}")
    show_load(table, counts)


def read_dictionary(path: Path) -> tuple[list[str], list[int]]:
    """Return a dictionary's symbols and counts, fairseq's special symbols included."""
    from fairseq.data import Dictionary

    if not path.is_file():
        raise UserError(f"{path} does not exist; give the dict.txt that fairseq-preprocess wrote")
    try:
        dictionary = Dictionary.load(str(path))
    except Exception as error:  # fairseq raises a bare one for another encoding than UTF-8
        raise UserError(f"{path} is no fairseq dictionary: {str(error).splitlines()[0]}") from error
    return dictionary.symbols, dictionary.count


def show_load(table: "HashTable", counts: list[int]) -> None:  # noqa: F821
    """Print the record of a table and the load of its experts on token counts."""
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    record = table.record
    load_E = np.zeros(record.num_experts)
    tokens_E = np.zeros(record.num_experts, dtype=np.int64)
    expert_V = table.expert_VK[:, 0].numpy()
    np.add.at(load_E, expert_V, np.asarray(counts, dtype=np.float64))
    np.add.at(tokens_E, expert_V, 1)
    mean = load_E.mean()
    rows = {
        "builder": record.builder if record.seed is None else f"{record.builder}, seed {record.seed}",
        "experts": f"{record.num_experts:,}",
        "vocabulary": f"{len(expert_V):,}",
        "tokens an expert serves": f"{tokens_E.min():,} to {tokens_E.max():,}",
        "largest load / mean": f"{load_E.max() / mean:.4f}",
        "smallest load / mean": f"{load_E.min() / mean:.4f}",
        "coefficient of variation": f"{load_E.std() / mean:.4f}",
    }
    shown = Table(show_header=False)
    for name, value in rows.items():
        shown.add_row(name, value)
    Console().print(shown)
