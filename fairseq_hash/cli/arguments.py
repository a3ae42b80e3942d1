"""Arguments that several verbs have."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

Add = Callable[..., Any]  # a parser's `add_argument`
Run = Callable[[argparse.Namespace], None]


def add_verb(verbs: Any, name: str, run: Run, help: str, description: "str | None" = None) -> Add:
    """Add a verb below a verb; return the function that adds its arguments."""
    parser = verbs.add_parser(name, help=help, description=description)
    parser.set_defaults(run=run)
    return parser.add_argument


def add_out(add: Add, help: str, replaced: str = "FILE") -> None:
    """Add --out and --overwrite of a verb that writes one file."""
    add("--out", type=Path, required=True, metavar="FILE", help=help)
    add("--overwrite", action="store_true", help=f"replace {replaced}")
