#!/usr/bin/env python3
"""How long do ranks wait for the fullest one, with experts placed by their loads, with replicas, and without?

    python benchmarks/even_ranks.py DATA [--experts 128] [--ranks 16,64] [--batch-tokens 1024,4096] [--out FILE]

DATA is a folder that fairseq-preprocess or data_prep wrote. Hash tables are built by the counts of its `train`, and so
is `--expert-placement balanced`; with replicas each rank holds one expert more (`--expert-replicas RANKS`). The batches
are those into which a training would cut and shuffle `valid` (`fairseq-hash plan --loads --text`). Straggler: the rows
of the fullest rank over the mean of its group, as the mean over the forward passes and as their 95 % quantile.
Expected: the same for the loads of the whole text. Bound: no placement has less expected, without replicas or with as
many. The result is a Markdown table.
"""

import argparse
from pathlib import Path

import fairseq_hash
from fairseq_hash.core.progress import Display
from fairseq_hash.core.quiet import only_warnings
from fairseq_hash.experiments.compose import compose
from fairseq_hash.experiments.loads import planned_loads
from fairseq_hash.experiments.names import own_configs
from fairseq_hash.hashing.dictionary import read_dictionary
from fairseq_hash.provenance import listed, provenance

TABLES = {
    "random": ["model.hash_table=random"],
    "balanced": ["model.hash_table=balanced", "+model.hash_count_eos=true"],
    "scattered, K = 2": [
        *("model.hash_table=scattered", "+model.hash_count_eos=true", "+model.experts_per_token=2"),
    ],
}
PASSES = 100  # the most of a group of ranks
HEADINGS = ("table", "ranks", "tokens of a rank's batch", "passes")
HEADINGS += ("contiguous: straggler", "95 %", "balanced: straggler", "95 %", "with replicas: straggler", "95 %")
HEADINGS += ("expected: contiguous", "balanced", "with replicas", "bound", "bound with replicas")


def measure(data: Path, experts: int, ranks: list[int], sizes: list[int]) -> list[list[str]]:
    """Return the rows of the table."""
    rows = []
    with Display(len(TABLES) * len(ranks)) as display:
        for name, overrides in TABLES.items():
            for number in ranks:
                given = [f"task.data='{data}'", f"model.num_experts={experts}", *overrides]
                given += ["+model.expert_placement=balanced", f"+model.expert_replicas={number}"]
                experiment = compose(own_configs(), "laptop/hash", given)
                display.begin(f"{name}, {number} ranks", 1)
                with only_warnings("fairseq"):
                    planned = planned_loads(experiment, number, sizes, PASSES, (data, "valid"))
                found = {(row["placement"], row["tokens"]): row for row in planned.rows()}
                for tokens in sizes:
                    placements = ("contiguous", "balanced", f"{number} replicas")
                    of_all = [found[placement, tokens] for placement in placements]
                    figures = [row[key] for row in of_all for key in ("straggler", "straggler_95")]
                    figures += [*(row["rank"] for row in of_all), of_all[0]["bound"], of_all[2]["bound"]]
                    about = (name, f"{number}", f"{tokens:,}", f"{of_all[0]['passes']:,}")
                    rows.append([*about, *(f"{value:.3f}" for value in figures)])
                display.end("done")
    return rows


def markdown(rows: list[list[str]], experts: int, facts: dict[str, object]) -> str:
    """Return the whole result as text."""
    lines = ["# Even ranks", "", f"`benchmarks/even_ranks.py`, which defines the columns; {experts} experts", ""]
    lines += listed(facts)
    lines += ["", f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with dict.txt, train and valid")
    parser.add_argument("--experts", type=int, default=128, help="number of experts (default: 128)")
    parser.add_argument("--ranks", default="16,64", help="numbers of ranks (default: 16,64)")
    parser.add_argument("--batch-tokens", default="1024,4096", help="tokens of a rank's batch (default: 1024,4096)")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    ranks, sizes = ([int(part) for part in text.split(",")] for text in (options.ranks, options.batch_tokens))
    fairseq_hash.register()
    rows = measure(options.data, options.experts, ranks, sizes)
    symbols, counts = read_dictionary(options.data / "dict.txt")
    facts = {**provenance(), "data": options.data.name, "symbols": f"{len(symbols):,}", "counted": f"{sum(counts):,}"}
    text = markdown(rows, options.experts, facts)
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
