"""YAML that somebody else wrote: refused before it is loaded where reading it would take too much time or memory."""

import re
from pathlib import Path

import yaml

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.json_text import depth_of

DEEPEST = 50  # brackets within each other
MOST_VALUES = 100_000  # once every alias is replaced by what it stands for
MOST_BYTES = 1 << 20
ALIAS = re.compile(r"(?m)(?:^|[\s\[{,:-])\*\w")


def check_yaml(path: Path) -> None:
    """Raise `UserError` for a file that is too long, is nested too deeply, or whose aliases stand for too much.

    Whether it is YAML at all is left to who loads it, as is a file that cannot be read.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} has more than {MOST_BYTES >> 20} MiB; give a YAML file of settings")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    deepest = depth_of("".join(line.partition(" #")[0] for line in text.splitlines()))
    if deepest > DEEPEST:
        raise UserError(f"{path} is nested too deeply ({deepest} brackets); give at most {DEEPEST}")
    if ALIAS.search(text) and _values(text) > MOST_VALUES:
        raise UserError(f"{path} has aliases that stand for more than {MOST_VALUES:,} values; write fewer")


def _values(text: str) -> int:
    """Return the number of values in a text, those of an alias as often as it stands there; 0 if it is no YAML."""
    known: dict[int, int] = {}

    def count(node: yaml.Node) -> int:
        if id(node) not in known:
            known[id(node)] = 1  # of a node within itself
            parts = node.value if isinstance(node, yaml.SequenceNode) else []
            parts = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else parts
            known[id(node)] = 1 + sum(map(count, parts))
        return known[id(node)]

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return count(node) if node is not None else 0
    except (yaml.YAMLError, RecursionError):
        return 0
