"""`fairseq-hash plan --loads`: the loads of an experiment's experts and ranks, and its stragglers, before it runs."""

import argparse
from pathlib import Path
from typing import Any

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import check_out
from fairseq_hash.core.quiet import only_warnings

OF_LOADS = ("text", "subset", "from_run", "batch_tokens", "passes", "out", "overwrite")
HEADINGS = f"{'Layers':<12}{'Placement':<16}{'expert':>8}{'rank':>8}{'bound':>8}"
OF_BATCHES = f"{'Batch':>10}{'Passes':>8}{'mean':>8}{'95 %':>8}{'Dropped':>9}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that go with --loads."""
    add = parser.add_argument_group("with --loads").add_argument
    add(
        "--text",
        type=Path,
        metavar="DATA",
        help="count batches of this binarized text, as training cuts and shuffles them (default: draw tokens by the "
        "counts of the training text, independently)",
    )
    add("--subset", metavar="NAME", help="subset of --text (default: that of the training)")
    add("--from-run", type=Path, metavar="RUN", help="the loads that a run logged (--log-expert-loads)")
    add("--batch-tokens", metavar="N,N", help="most tokens of a rank's batch (default: dataset.max_tokens)")
    add("--passes", type=int, metavar="N", help="the most forward passes of a group of ranks to look at; default 200")
    add("--out", type=Path, metavar="FILE", help="write the loads as CSV, for --expert-placement FILE")
    add("--overwrite", action="store_true", default=None, help="replace FILE")


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise `UserError` for a value that is out of range, or an argument that does nothing here."""
    given = [name for name in OF_LOADS if getattr(arguments, name) is not None]
    if given and not arguments.loads:
        raise UserError(f"{_flag(given[0])} goes with --loads; add --loads, or leave it out")
    of_batches = [name for name in ("text", "batch_tokens", "passes") if name in given]
    if arguments.from_run is not None and of_batches:
        raise UserError(f"{_flag(of_batches[0])} does not go with --from-run, which has no batches; leave it out")
    if arguments.subset is not None and arguments.text is None:
        raise UserError("--subset names a part of --text DATA; give --text, too")
    if arguments.overwrite and arguments.out is None:
        raise UserError("--overwrite replaces --out FILE; give --out, too")
    if arguments.passes is not None and arguments.passes < 1:
        raise UserError(f"--passes {arguments.passes} is out of range; give 1 or more")
    if arguments.out is not None:
        check_out(arguments.out, bool(arguments.overwrite))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def run(experiment: Any, arguments: argparse.Namespace) -> None:
    """Print the loads, and write them if asked for."""
    import numpy as np

    from fairseq_hash.experiments.loads import loads_of_run, planned_loads
    from fairseq_hash.parallel.load_files import write_loads

    with only_warnings("fairseq"):
        if arguments.from_run is not None:
            planned = loads_of_run(experiment, arguments.ranks, arguments.from_run)
        else:
            text = None
            if arguments.text is not None:
                text = (arguments.text, arguments.subset or experiment.config.dataset.train_subset)
            sizes = batch_sizes(arguments.batch_tokens)
            planned = planned_loads(experiment, arguments.ranks, sizes, arguments.passes or 200, text)
    print_loads(experiment.name, planned)
    if arguments.out is not None:
        place = planned.place
        rank_E = np.empty(place.num_experts, dtype=np.int64)
        for rank in reversed(range(place.size)):  # of copies the first counts
            rank_E[list(place.experts_at(rank))] = rank
        write_loads(arguments.out, planned.loads, rank_E)
        print(f"wrote {arguments.out}")


def batch_sizes(text: "str | None") -> tuple[int, ...]:
    """Return the numbers in a comma-separated list; none for None."""
    try:
        sizes = tuple(int(number) for number in text.split(",")) if text is not None else ()
    except ValueError:
        sizes = (0,)
    if any(size < 1 for size in sizes):
        raise UserError(f"--batch-tokens {text} is no list of numbers of tokens; give numbers such as 1024,4096")
    return sizes


def print_loads(name: str, planned: Any) -> None:
    """Print the figures as a table."""
    place = planned.place
    held = f"{place.size} ranks share {place.what()}, {place.local_experts} each"
    if not place.is_shared:
        held = f"every rank holds all {place.num_experts} experts, so that no rank waits for another's rows"
    print(f"{name}: {held}")
    print(f"Loads: {planned.source}")
    print("expert, rank: the largest load over the mean. bound: no placement has a smaller largest rank.")
    if planned.batches:
        print(
            "mean, 95 %: the straggler factor, the rows of the fullest rank over the mean of its group: the mean over"
        )
        print(
            "forward passes, and what one in twenty exceeds. Batch: the most tokens of a rank. Dropped: over capacity."
        )
    print(HEADINGS + (OF_BATCHES if planned.batches else ""))
    for row in planned.rows():
        layers = ", ".join(map(str, row["layers"]))
        line = f"{_short(layers, 11):<12}{_short(row['placement'], 15):<16}"
        line += "".join(f"{row[name]:>8.3f}" for name in ("expert", "rank", "bound"))
        if "tokens" in row:
            dropped = f"{row['dropped']:.2%}" if planned.capacity_factor else "–"
            line += f"{row['tokens']:>10,}{row['passes']:>8,}{row['straggler']:>8.3f}{row['straggler_95']:>8.3f}"
            line += f"{dropped:>9}"
        print(line)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
