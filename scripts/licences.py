#!/usr/bin/env python3
"""List the licence of every package in the environment, as each package states it (docs/licences.md).

    .venv/bin/python scripts/licences.py --out docs/licences.md

A package states its licence in its metadata: as an expression, as text, or by classifiers. Nothing is looked up.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

PINS = Path(__file__).resolve().parent / "pins-py311.txt"
OWN = {"fairseq_hash", "pip", "setuptools", "wheel"}  # this project, and what makes environments
CLASSIFIER = "License :: "
LONGEST = 60  # characters; some packages give the whole text of their licence in the place of its name
HEAD = """# Licences

The licences of all packages of the pinned environment ([pins](../scripts/pins-py311.txt)), direct and transitive, as
each package states it in its own metadata. `python scripts/licences.py` made this list; it is no legal advice.

| Package | Version | Licence |
|---|---|---|
"""


def plain(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def licence_of(package: metadata.Distribution) -> str:
    """Return the licence that a package states, `not stated` if it states none."""
    given = package.metadata
    if expression := given.get("License-Expression"):
        return expression
    classified = [one.rpartition(" :: ")[2] for one in given.get_all("Classifier") or [] if one.startswith(CLASSIFIER)]
    text = (given.get("License") or "").strip().splitlines()
    if text and text[0].upper() != "UNKNOWN" and len(text) == 1 and len(text[0]) <= LONGEST:
        return text[0]
    return ", ".join(dict.fromkeys(classified)) or (text[0].strip()[:LONGEST] if text else "not stated")


def pinned(text: str) -> dict[str, str]:
    """Return the version of each package in the text of a file of pins."""
    pairs = (line.split("==") for line in text.splitlines() if "==" in line and not line.startswith("#"))
    return {plain(name): version for name, version in pairs}


def listed(packages: Iterable[metadata.Distribution]) -> str:
    """Return the list as Markdown."""
    rows = {}
    for package in packages:
        name = package.metadata["Name"]
        if plain(name) not in {plain(own) for own in OWN}:
            version = package.version.partition("+")[0] if plain(name) != "fairseq" else package.version
            rows[plain(name)] = f"| {name} | {version} | {licence_of(package).replace('|', '/')} |"
    return HEAD + "\n".join(row for _, row in sorted(rows.items())) + "\n"


def main() -> int:
    """Write the list of this environment; return 1 if it is not the pinned one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="Markdown file to write")
    arguments = parser.parse_args()
    wanted = pinned(PINS.read_text(encoding="utf-8"))
    packages = list(metadata.distributions())
    found = {plain(one.metadata["Name"]): one.version.partition("+")[0] for one in packages}
    if other := [f"{name} {version}" for name, version in wanted.items() if found.get(name) != version]:
        print(f"licences: this environment lacks {', '.join(other[:5])}; run it in the pinned one", file=sys.stderr)
        return 1
    arguments.out.write_text(listed(packages), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
