"""`fairseq-hash tables show` on tables of other frameworks: what they are, before their balance is judged."""

import argparse

import numpy as np

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.validators import check_at_least
from fairseq_hash.hashing import HashTable
from fairseq_hash.hashing.dictionary import read_dictionary, read_vocabulary, token_counts
from fairseq_hash.table_tools.forensics import builder_of, overlaps, problems
from fairseq_hash.table_tools.tid2eid import import_table, read_tensors


def describe_foreign(arguments: argparse.Namespace) -> dict[str, HashTable]:
    """Print what each tensor `tid2eid` of a file is, and what each two of them share.

    Returns:
        The tables for the dictionary, by the names of their tensors; none without a dictionary.

    Raises:
        UserError: if a file cannot be read; at the end, if a table has problems, each of which was printed.
    """
    if arguments.num_experts is not None:
        check_at_least("--num-experts", arguments.num_experts, 1)
    vocabulary, counts = _vocabulary(arguments)
    tables, stated = read_tensors(arguments.table, arguments.tensor)
    num_experts = arguments.num_experts or stated
    if num_experts is None:
        num_experts = 1 + max(int(expert_VK.max()) for expert_VK in tables.values())
        print(f"note: {num_experts} experts, by the largest number in the file; --num-experts states their number")
    faults = 0
    for name, expert_VK in tables.items():
        rows, columns = expert_VK.shape
        known = rows if vocabulary is None else min(rows, len(vocabulary))
        found = problems(expert_VK, num_experts, None if vocabulary is None else len(vocabulary))
        builder = "" if found else f"; looks like {builder_of(expert_VK[:known], num_experts, counts)}"
        print(f"{name}: {rows:,} rows of {columns} of {num_experts} experts{builder}")
        if rows > known:
            print(f"{name}: {rows - known:,} rows after the vocabulary's {known:,}, as padding or for added tokens")
        for problem in found:
            print(f"problem: {name}: {problem}")
        faults += len(found)
    for line in overlaps(tables, num_experts):
        print(line)
    if faults:
        what = "1 problem" if faults == 1 else f"{faults} problems"
        raise UserError(f"{arguments.table} has {what}, printed above; tables import refuses such a table")
    if vocabulary is None:
        return {}
    symbols, _ = read_dictionary(arguments.dictionary)
    given = vocabulary if arguments.vocabulary is not None else None
    return {
        name: import_table(expert_VK[: len(vocabulary)], name, symbols, num_experts, given)[0]
        for name, expert_VK in tables.items()
    }


def _vocabulary(arguments: argparse.Namespace) -> "tuple[list[str] | None, np.ndarray | None]":
    """Return the symbols of the tables' rows, and how often each occurs; None for what is not known."""
    if arguments.dictionary is None:
        if arguments.vocabulary is not None:
            raise UserError("--vocabulary needs DICT, too, which has the counts: fairseq-hash tables show TABLE DICT")
        return None, None
    symbols, listed = read_dictionary(arguments.dictionary)
    count_V, _ = token_counts(arguments.counts, arguments.dictionary, symbols, listed, lambda line: None)
    if arguments.vocabulary is None:
        return symbols, count_V
    vocabulary, count_of = read_vocabulary(arguments.vocabulary), dict(zip(symbols, count_V.tolist(), strict=True))
    return vocabulary, np.array([count_of.get(symbol, 0) for symbol in vocabulary])
