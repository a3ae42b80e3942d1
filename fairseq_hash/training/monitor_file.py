"""The monitor's file, `experts.jsonl`: one line of JSON for each measurement of a sparse layer.

A killed training may leave its last line cut off, and lines of updates after its last checkpoint, which it makes again.
Both go when it resumes: the file then reads as that of a training that was never stopped.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq_hash.core.fields import fits
from fairseq_hash.core.files import atomic_write
from fairseq_hash.core.json_text import parse_object

logger = logging.getLogger(__name__)

NAME = "experts.jsonl"
# Of what a record has, what is looked at when a training resumes.
OF_RECORD = {"update": int, "layer": int, "router": str, "dropped": float, "load": list[float]}


class MonitorFile:
    """The file of a save dir, which one process writes."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def resume(self, update: int) -> list[dict[str, Any]]:
        """Return the records up to an update, from which the training goes on; nothing else stays in the file."""
        if not self.path.is_file():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        records = list(map(_record, lines))
        kept = [number for number, record in enumerate(records) if record is not None and record["update"] <= update]
        if len(kept) < len(lines):
            with atomic_write(self.path) as partial:
                partial.write_bytes(b"".join(lines[number] for number in kept))
            logger.info(
                "%s: %d of %d lines stay; the others are of updates after %d, which are made again, or damaged",
                *(self.path, len(kept), len(lines), update),
            )
        return [records[number] for number in kept]

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Write the records of one measurement, by one call."""
        text = "".join(json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n" for record in records)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                file.write(text.encode())
        except OSError as error:  # no reason to end a training
            logger.warning("cannot write to %s (%s): this measurement is in the log only", self.path, error.strerror)


def _record(line: bytes) -> "dict[str, Any] | None":
    """Return the record of a line; None if it is not whole, or none of ours."""
    try:
        record = parse_object(line.decode("utf-8"))
    except ValueError:
        return None
    is_ours = all(name in record and fits(record[name], kind) for name, kind in OF_RECORD.items())
    return record if is_ours and line.endswith(b"\n") else None
