#!/usr/bin/env python3
"""How evenly each builder's tables load the experts, in the text from which they are built and in held-out text.

    python benchmarks/tables_on_text.py DATA [--experts 16,64,128] [--columns 1,4] [--embeddings CKPT] [--out FILE]

DATA is a folder that fairseq-preprocess or data_prep wrote. Tables are built from the counts of its `train` and judged
on `train` and on `valid`. Columns: the largest load divided by the mean, and its lower bound for any table with the
same keys; the coefficient of variation of the loads; the number of keys that alone exceed the mean load; the number of
different sets of K experts among the rows. The result is a Markdown table.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fairseq_hash.core.progress import Display
from fairseq_hash.hashing.dictionary import read_dictionary
from fairseq_hash.provenance import listed, provenance
from fairseq_hash.table_tools.build_options import Options
from fairseq_hash.table_tools.build_table import build
from fairseq_hash.table_tools.evaluate_balance import Judge, JudgedTable
from fairseq_hash.table_tools.token_streams import open_text

RESTARTS = 16
HEADINGS = ("E", "K", "table", "largest / mean", "no table is below", "valid: largest / mean", "no table is below")
HEADINGS += ("CV", "valid: CV", "keys that overload", "valid", "sets of experts")


def recipes(base: Options) -> Iterator[tuple[str, Options]]:
    """Yield the tables to build, by name; those of clusters only if there are embeddings."""
    listed = replace(base, text=None)
    yield "random", replace(listed, builder="random")
    yield f"random, best of {RESTARTS}", replace(base, builder="random", restarts=RESTARTS)
    yield "round-robin", replace(listed, builder="round-robin")
    if base.embeddings is not None:
        yield "clusters", replace(listed, builder="clusters", embeddings=base.embeddings)
        yield "dispersed", replace(base, builder="dispersed")
    yield "balanced on the dictionary's counts", listed
    yield "balanced", base
    yield f"balanced, best of {RESTARTS}", replace(base, restarts=RESTARTS)
    yield "scattered", replace(base, builder="scattered")
    yield "spread", replace(base, builder="spread")
    yield "spread, scattered", replace(base, builder="spread", base="scattered")


def measure(data: Path, experts: list[int], columns: list[int], embeddings: "Path | None") -> list[list[str]]:
    """Return the rows of the table."""
    symbols, _ = read_dictionary(data / "dict.txt")
    train, valid = (open_text(data, subset, symbols) for subset in ("train", "valid"))
    rows = []
    with Display(len(experts) * len(columns)) as display:
        judge = Judge(symbols, None, train, valid, say=display.say)
        for num_experts in experts:
            for count in columns:
                display.begin(f"E = {num_experts}, K = {count}", 1)
                base = Options(
                    dictionary=data / "dict.txt",
                    num_experts=num_experts,
                    experts_per_token=count,
                    text=data,
                    embeddings=embeddings,
                )
                for name, options in recipes(base):
                    if options.builder not in ("clusters", "dispersed"):
                        options = replace(options, embeddings=None)
                    display.detail(name)
                    table = build(options, lambda line: None).table
                    rows.append([str(num_experts), str(count), name, *figures(judge.judge(name, table))])
                display.end("done")
    return rows


def figures(table: JudgedTable) -> list[str]:
    """Return the figures of a table in the order of the headings."""
    on_train, on_valid = (judged.balance for judged in table.judged)
    largest = [f"{value:.4f}" for on in (on_train, on_valid) for value in (on.largest_over_mean, on.bound_over_mean)]
    variation = [f"{on.coefficient_of_variation:.4f}" for on in (on_train, on_valid)]
    heavy = [str(len(on.overloading)) for on in (on_train, on_valid)]
    return [*largest, *variation, *heavy, f"{table.sets_of_experts:,}"]


def markdown(rows: list[list[str]], facts: dict[str, object]) -> str:
    """Return the whole result as text."""
    lines = ["# Balance of hash tables on text", "", "`benchmarks/tables_on_text.py`, which defines the columns", ""]
    lines += listed(facts)
    lines += ["", f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with dict.txt, train and valid")
    parser.add_argument("--experts", default="16,64,128", help="numbers of experts (default: 16,64,128)")
    parser.add_argument("--columns", default="1,4", help="experts a token (default: 1,4)")
    parser.add_argument("--embeddings", type=Path, help="checkpoint trained on this data: adds clusters and dispersed")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    experts, columns = ([int(part) for part in text.split(",")] for text in (options.experts, options.columns))
    rows = measure(options.data, experts, columns, options.embeddings)
    symbols, counts = read_dictionary(options.data / "dict.txt")
    facts = {**provenance(), "data": options.data.name, "symbols": f"{len(symbols):,}", "counted": f"{sum(counts):,}"}
    text = markdown(rows, facts)
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
