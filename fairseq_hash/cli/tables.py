"""`fairseq-hash tables`: build hash tables, judge and compare their balance, exchange them with other frameworks."""

import argparse
from pathlib import Path

from fairseq_hash.cli.arguments import Add, add_out, add_verb
from fairseq_hash.cli.tables_from_router import add_verb_from_router
from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import check_folder, check_out
from fairseq_hash.core.options import add_options, flag_of, given_options
from fairseq_hash.core.validators import check_at_least
from fairseq_hash.hashing.dictionary import read_dictionary, read_vocabulary, token_counts
from fairseq_hash.hashing.table import HashTable
from fairseq_hash.table_tools.build_options import Options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb `tables`, and add its own verbs."""
    parser.description = "Build hash tables, judge their balance, exchange them with other frameworks."
    verbs = parser.add_subparsers(dest="tables_verb", required=True, metavar="VERB")
    build = verbs.add_parser("build", help="build a table for a dictionary and write it to a file")
    build.add_argument("dictionary", type=Path, metavar="DICT", help="dict.txt of the data, with token counts")
    add_options(build, Options)
    add_out(build.add_argument, "table file to write (safetensors)")
    build.set_defaults(run=run_build)

    add_verb_from_router(verbs)

    add = add_verb(
        verbs,
        "show",
        run_show,
        "show how evenly a table loads the experts",
        "Show how evenly a table loads the experts, on the dictionary's counts or others and on held-out text, "
        "compared with the bound that no table can beat.",
    )
    add("table", type=Path, metavar="TABLE", help="table file, or another framework's tensors tid2eid")
    text = "dict.txt that the table was built for; another framework's table is also shown without it"
    add("dictionary", type=Path, nargs="?", metavar="DICT", help=text)
    add("--num-experts", type=int, metavar="E", help="experts of another framework's table (default: as it says)")
    add("--tensor", metavar="NAME", help="tensor of another framework (default: all whose name ends in tid2eid)")
    _add_vocabulary(add, "of another framework's rows")
    _add_judging(add)

    add = add_verb(verbs, "compare", run_compare, "show several tables of one dictionary side by side")
    add("tables", nargs="+", type=Path, metavar="TABLE", help="table files, and then the dict.txt")
    add("--dictionary", type=Path, metavar="DICT", help="the dict.txt, instead of the last TABLE")
    _add_judging(add)

    add = add_verb(verbs, "export", run_export, "write a table of token ids as the tensor tid2eid of other frameworks")
    add("table", type=Path, metavar="TABLE", help="table file")
    add("dictionary", type=Path, nargs="?", metavar="DICT", help="dict.txt of the table; needed with --vocabulary")
    _add_vocabulary(add, "of the rows to write")
    _add_seed(add, "that our dictionary lacks")
    text = "add rows up to a multiple of N, as frameworks pad their vocabulary (default: add none)"
    add("--pad-to-multiple", type=int, default=1, metavar="N", help=text)
    add_out(add, "file to write: .npy, or else safetensors")

    text = "make a table from another framework's tensor, which maps token ids to expert ids"
    add = add_verb(verbs, "import", run_import, text)
    add("file", type=Path, metavar="FILE", help="safetensors, or .npy")
    add("dictionary", type=Path, metavar="DICT", help="dict.txt for which the table is made")
    add("--num-experts", type=int, required=True, metavar="E", help="number of experts, 1 or more")
    add("--tensor", metavar="NAME", help="tensor to read (default: the only one whose name ends in tid2eid)")
    _add_vocabulary(add, "of the tensor's rows")
    _add_seed(add, "that the vocabulary lacks")
    add("--padded", action="store_true", help="leave out rows after those of the vocabulary, which are padding")
    add_out(add, "table file to write (safetensors)")


def _add_judging(add: Add) -> None:
    add("--counts", type=Path, metavar="FILE", help="lines `symbol count`, instead of the dictionary's counts")
    add("--text", type=Path, metavar="PATH", help="count in this text instead (as tables build --text)")
    add("--subset", default="train", help="subset of --text, if it is a data folder (default: train)")
    add("--held-out", type=Path, metavar="PATH", help="judge on this text as well")
    add("--held-out-subset", default="valid", metavar="SUBSET", help="subset of --held-out (default: valid)")
    cut = "cut texts into samples of N tokens, as training does (default: do not); needed for positions"
    add("--tokens-per-sample", type=int, default=0, metavar="N", help=cut)
    add("--out", type=Path, metavar="FOLDER", help="write a page, a figure, CSV and JSON to this folder")


def _add_vocabulary(add: Add, whose: str) -> None:
    text = f"symbols {whose}, one per line, or a SentencePiece .vocab (default: the dictionary's order)"
    add("--vocabulary", type=Path, metavar="FILE", help=text)


def _add_seed(add: Add, lacking: str) -> None:
    text = f"seed of the random experts for symbols {lacking}, 0 or more (default: 42)"
    add("--seed", type=int, default=42, help=text)


def run_build(arguments: argparse.Namespace) -> None:
    """Build and write a table, then show it."""
    from fairseq_hash.hashing import save_table
    from fairseq_hash.hashing.balance import judge
    from fairseq_hash.table_tools.balance_report import show
    from fairseq_hash.table_tools.build_options import check
    from fairseq_hash.table_tools.build_table import build
    from fairseq_hash.table_tools.evaluate_balance import UNUSED, Judged, JudgedTable

    options = given_options(Options, arguments)
    check(options)
    check_out(arguments.out, arguments.overwrite)
    built = build(options, print)
    save_table(built.table, arguments.out)
    print(f"wrote {arguments.out}")
    table, record, judged = built.table, built.table.record, []
    if built.count_H is not None and built.count_H.any():
        balance = judge(table.expert_HK, built.count_H, record.num_experts, record.is_multi_hash)
        what = UNUSED if record.counts_fingerprint is None else "building counts"
        judged = [Judged(what, built.source, built.count_H, balance)]
    show([JudgedTable(arguments.out.name, table, judged)], read_dictionary(options.dictionary)[0])


def run_show(arguments: argparse.Namespace) -> None:
    """Show a table, and write a folder if asked for. Of another framework, show first what its tables are."""
    from fairseq_hash.cli.tables_foreign import describe_foreign
    from fairseq_hash.table_tools.tid2eid import is_foreign

    _check_judging(arguments)
    if is_foreign(arguments.table) or arguments.tensor:
        tables = describe_foreign(arguments)
        if tables:
            _judge(tables, arguments.dictionary, arguments)
        return
    for name in ("num_experts", "vocabulary"):
        if getattr(arguments, name) is not None:
            raise UserError(f"{flag_of(name)} is for tables of other frameworks, and {arguments.table} is none of them")
    if arguments.dictionary is None:
        raise UserError(f"{arguments.table} needs DICT, too: fairseq-hash tables show TABLE DICT")
    _judge_files([arguments.table], arguments.dictionary, arguments)


def run_compare(arguments: argparse.Namespace) -> None:
    """Show several tables, and write a folder if asked for."""
    _check_judging(arguments)
    paths, dictionary = arguments.tables, arguments.dictionary
    if dictionary is None:
        *paths, dictionary = paths
    if not paths:
        raise UserError(f"{dictionary} alone is nothing to compare; give table files and then the dict.txt")
    _judge_files(paths, dictionary, arguments)


def _check_judging(arguments: argparse.Namespace) -> None:
    if arguments.counts and arguments.text:
        raise UserError("--counts and --text both give the counts of tokens; leave one out")
    if arguments.tokens_per_sample < 0:
        raise UserError(f"--tokens-per-sample {arguments.tokens_per_sample} is out of range; give 0 or more")
    if arguments.out is not None:
        check_folder(arguments.out)


def _judge_files(paths: list[Path], dictionary: Path, arguments: argparse.Namespace) -> None:
    from fairseq_hash.table_tools.evaluate_balance import open_table

    symbols, _ = read_dictionary(dictionary)
    names = [path.name for path in paths]
    names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    tables = {name: open_table(path, symbols, dictionary) for name, path in zip(names, paths, strict=True)}
    _judge(tables, dictionary, arguments)


def _judge(tables: dict[str, HashTable], dictionary: Path, arguments: argparse.Namespace) -> None:
    from fairseq_hash.table_tools.balance_report import show, write
    from fairseq_hash.table_tools.evaluate_balance import Judge
    from fairseq_hash.table_tools.token_streams import open_text

    symbols, listed = read_dictionary(dictionary)
    counts = token_counts(arguments.counts, dictionary, symbols, listed, print)
    texts = ((arguments.text, arguments.subset), (arguments.held_out, arguments.held_out_subset))
    texts = [open_text(path, subset, symbols) if path is not None else None for path, subset in texts]
    judge = Judge(symbols, counts, *texts, arguments.tokens_per_sample)
    for name, table in tables.items():
        judge.check(name, table)
    judged = [judge.judge(name, table) for name, table in tables.items()]
    show(judged, symbols)
    if arguments.out is not None:
        for path in write(judged, symbols, arguments.out):
            print(f"wrote {path}")


def run_export(arguments: argparse.Namespace) -> None:
    """Write a table's experts for another framework."""
    from fairseq_hash.table_tools.evaluate_balance import open_table, read_table
    from fairseq_hash.table_tools.tid2eid import check_exportable, pad, reorder, write_tensor

    check_at_least("--seed", arguments.seed, 0)
    check_at_least("--pad-to-multiple", arguments.pad_to_multiple, 1)
    check_out(arguments.out, arguments.overwrite)
    if arguments.vocabulary is not None and arguments.dictionary is None:
        raise UserError(
            "--vocabulary needs DICT, too, because a table has no symbols: fairseq-hash tables export TABLE DICT"
        )
    if arguments.dictionary is None:
        table = read_table(arguments.table)
    else:
        symbols, _ = read_dictionary(arguments.dictionary)
        table = open_table(arguments.table, symbols, arguments.dictionary)
    check_exportable(table, arguments.table)
    expert_VK = table.expert_HK
    if arguments.vocabulary is not None:
        wanted = read_vocabulary(arguments.vocabulary)
        expert_VK, missing = reorder(expert_VK, symbols, wanted, table.record.num_experts, arguments.seed)
        _say_missing(missing, len(wanted), f"{arguments.vocabulary}", "the dictionary")
    padded_VK = pad(expert_VK, arguments.pad_to_multiple, table.record.num_experts)
    write_tensor(padded_VK, table.record, arguments.out)
    print(f"wrote {arguments.out}")
    if len(padded_VK) > len(expert_VK):
        print(f"note: the last {len(padded_VK) - len(expert_VK):,} of {len(padded_VK):,} rows are padding")


def run_import(arguments: argparse.Namespace) -> None:
    """Make a table from another framework's tensor, and write it."""
    from fairseq_hash.hashing import save_table
    from fairseq_hash.table_tools.balance_report import show
    from fairseq_hash.table_tools.evaluate_balance import Judge
    from fairseq_hash.table_tools.tid2eid import import_table, read_tensor

    check_at_least("--seed", arguments.seed, 0)
    check_at_least("--num-experts", arguments.num_experts, 1)
    check_out(arguments.out, arguments.overwrite)
    symbols, listed = read_dictionary(arguments.dictionary)
    vocabulary = read_vocabulary(arguments.vocabulary) if arguments.vocabulary is not None else None
    expert_WK, name = read_tensor(arguments.file, arguments.tensor)
    if arguments.padded:
        expert_WK = expert_WK[: len(symbols if vocabulary is None else vocabulary)]
    table, missing = import_table(expert_WK, name, symbols, arguments.num_experts, vocabulary, arguments.seed)
    if vocabulary is not None:
        _say_missing(missing, len(symbols), f"{arguments.dictionary}", "the vocabulary")
    save_table(table, arguments.out)
    print(f"wrote {arguments.out}")
    counts = token_counts(None, arguments.dictionary, symbols, listed, print)
    show([Judge(symbols, counts).judge(arguments.out.name, table)], symbols)


def _say_missing(missing: int, symbols: int, whose: str, where: str) -> None:
    if missing:
        print(f"note: {missing:,} of {symbols:,} symbols of {whose} are not in {where}; they have random experts")
