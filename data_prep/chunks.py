"""Writes a split's lines of tokens to files of bounded size, and counts them."""

from collections import Counter
from pathlib import Path
from typing import Any

from .pieces import Batch

# fairseq-preprocess holds about 80 bytes per line in memory, so chunks have a limit on lines, too.
CHUNK_BYTES, CHUNK_LINES = 128 << 20, 2_000_000


class ChunkWriter:
    """Writes a split's batches of tokens to chunks `SPLIT.000.txt`, ..., and adds up their counts."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.names: list[str] = []
        self.lines = self.tokens = self.words = self.characters = self.reserved = 0
        self.counts = Counter[str]()
        self._room_bytes = self._room_lines = 0

    def __enter__(self) -> "ChunkWriter":
        self._open()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _open(self) -> None:
        self.names.append(f"{self.split}.{len(self.names):03d}.txt")
        self._file = (self.folder / self.names[-1]).open("w", encoding="utf-8", newline="\n")
        self._room_bytes, self._room_lines = CHUNK_BYTES, CHUNK_LINES

    def add(self, batch: Batch) -> None:
        """Write a batch, to a new chunk if this one is full."""
        if self._room_bytes <= 0 or self._room_lines <= 0:
            self._file.close()
            self._open()
        self._file.write(batch.text)
        self._room_bytes -= len(batch.text)
        self._room_lines -= batch.lines
        self.lines += batch.lines
        self.tokens += batch.tokens
        self.words += batch.words
        self.characters += batch.characters
        self.reserved += batch.reserved
        self.counts.update(batch.counts)

    def totals(self) -> dict[str, Any]:
        """Return the split's counts; tokens are counted without line ends."""
        names = ("lines", "tokens", "words", "characters", "reserved")
        return {**{name: getattr(self, name) for name in names}, "chunks": self.names}
