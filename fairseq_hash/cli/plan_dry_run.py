"""`fairseq-hash plan --dry-run`: memory, bytes between ranks and time of one rank of a job, before it runs."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from fairseq_hash.core.errors import UserError

DEFAULT = "h100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that go with --dry-run."""
    add = parser.add_argument_group("with --dry-run").add_argument
    add("--gpu", metavar="NAME", help=f"the device: h100, h200, a100 or a YAML file of rates; default {DEFAULT}")
    add("--nodes", type=int, metavar="M", help="nodes of the ranks (default: as few as can be)")
    add("--rank", type=int, metavar="R", help="which rank, from 0; default 0, or the fullest of --load-file")
    add(
        "--load-file",
        type=Path,
        metavar="FILE",
        help="give each expert rows by its load in this file, which plan --loads --out writes (default: all alike)",
    )


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise `UserError` for an argument that does nothing here."""
    given = [name for name in ("gpu", "nodes", "rank", "load_file") if getattr(arguments, name) is not None]
    if given and not arguments.dry_run:
        raise UserError(f"--{given[0].replace('_', '-')} goes with --dry-run; add --dry-run, or leave it out")


def run(experiment: Any, arguments: argparse.Namespace) -> None:
    """Run an update dry, and print what it was."""
    from fairseq_hash.dry_run.hardware import hardware
    from fairseq_hash.dry_run.loads import PlacedLoads
    from fairseq_hash.dry_run.report import EVEN, in_nodes, show
    from fairseq_hash.dry_run.update import dry_run

    ranks, rank = arguments.ranks, arguments.rank or 0
    on = in_nodes(hardware(arguments.gpu or DEFAULT), ranks, arguments.nodes)
    rows = EVEN
    if arguments.load_file is None:
        of = dry_run(experiment, ranks, rank, on)
    else:
        loads = PlacedLoads.of(experiment, ranks, arguments.load_file)
        rank = loads.fullest if arguments.rank is None else rank
        of = dry_run(loads.experiment, ranks, rank, on, loads.rows)
        of = replace(of, place=replace(loads.place, rank=rank))
        rows = f"Rows go to experts by {arguments.load_file}, the same share in every layer; rank {loads.fullest} has "
        rows += f"{loads.factor:.2f} times the mean of its group, the most. Batches vary, and this factor with them."
    nodes = -(-ranks // on.devices_per_node)
    where = f"rank {rank} of {ranks:,}, {nodes:,} node{'s'[: nodes > 1]} of up to {on.devices_per_node} x {on.name}"
    show(of, f"{experiment.name}: {where}", on, ranks, experiment.config.optimization.max_update, rows=rows)
