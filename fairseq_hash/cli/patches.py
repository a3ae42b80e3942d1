"""`fairseq-hash patches`: what the plugin changes in fairseq and why, and whether this fairseq is the known one."""

import argparse
import json
from typing import Any

# Whether the source of a function of fairseq's is the one that its override was written against.
STATES = {True: "known", False: "changed", None: "not fairseq's"}
COLUMNS = ("module", "target", "source", "reason")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb `patches`, and add its arguments."""
    parser.description = (
        "List every place where the plugin changes fairseq, in the order in which the changes are made: "
        "the module of fairseq_hash/fairseq_patches, what it replaces and why, and whether the source of the installed "
        "fairseq is the one that the change was written against (known or changed)."
    )
    parser.add_argument("--json", action="store_true", help="write JSON in place of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Show the overrides of the installed fairseq."""
    version, records = list_patches()
    if arguments.json:
        print(json.dumps({"fairseq": version, "patches": records}, indent=2))
    else:
        _show(version, records)


def list_patches() -> tuple[str, list[dict[str, Any]]]:
    """Return fairseq's version, and for each override its `COLUMNS`; `source` is one of `STATES`.

    Raises:
        SystemExit: with one line, for a fairseq that the plugin was not written against.
    """
    import fairseq_hash

    fairseq_hash.register()
    import fairseq

    from fairseq_hash.fairseq_patches.registry import is_source_known, overrides

    rows = [(entry.module, entry.target, STATES[is_source_known(entry)], entry.reason) for entry in overrides()]
    return fairseq.__version__, [dict(zip(COLUMNS, row, strict=True)) for row in rows]


def _show(version: str, records: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(*(Column(name, overflow="fold") for name in COLUMNS), title=f"fairseq {version}")
    for record in records:
        table.add_row(*(record[column] for column in COLUMNS))
    Console(highlight=False).print(table)
