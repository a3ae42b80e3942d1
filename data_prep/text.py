"""Reads text from plain or compressed files, line by line, with checks."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from fairseq_hash.core.errors import UserError

MOST_MEMORY = 256 << 20  # bytes that unpacking xz may take: xz -9 needs 65 MiB, and a file can ask for 4 GiB
BLOCK = 1 << 16  # bytes
LONGEST_LINE = 1 << 24  # bytes; a line is held in memory, and real training lines are much shorter


class XZ(io.RawIOBase):
    """The text of an xz file, read with little memory whatever the file asks for. Python's own reader has no limit."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw, self.decoder = raw, _decoder()

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes of the text; return their number, 0 at its end.

        Raises:
            lzma.LZMAError: if the file is damaged, or asks for more than `MOST_MEMORY`.
            EOFError: if it ends too early.
        """
        while True:
            if self.decoder.eof:  # of a stream; another one may follow, after zeros
                rest = (self.decoder.unused_data or self.raw.read(BLOCK)).lstrip(b"\0")
                while not rest and (block := self.raw.read(BLOCK)):
                    rest = block.lstrip(b"\0")
                if not rest:
                    return 0
                self.decoder = _decoder()
            else:
                rest = self.raw.read(BLOCK) if self.decoder.needs_input else b""
                if self.decoder.needs_input and not rest:
                    raise EOFError("the file ended before the end of its stream")
            if text := self.decoder.decompress(rest, len(buffer)):
                buffer[: len(text)] = text
                return len(text)


def _decoder() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MOST_MEMORY)


def open_xz(raw: BinaryIO) -> io.BufferedReader:
    """Return the text of an open xz file, as bytes."""
    return io.BufferedReader(XZ(raw), 1 << 20)


OPENERS = {".xz": open_xz, ".gz": gzip.open, ".bz2": bz2.open}


def check_files(files: Sequence[Path]) -> None:
    """Raise `UserError` for the first file that is missing or empty."""
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is not a file; give a text file (plain, .xz, .gz or .bz2)")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty; give a file with text")


def read_lines(files: Sequence[Path], on_bytes: Callable[[int], None]) -> Iterator[str]:
    """Yield the lines of UTF-8 files, one after another, without their line ends, including blank lines.

    `on_bytes` is called now and then with the number of bytes read from the files on disk. Memory does not depend on
    the size of the files.

    Raises:
        UserError: if a file is damaged, is not UTF-8, has a line of more than 16 MiB, or if no line has text.
    """
    before = 0
    blank = True
    for path in files:
        with path.open("rb") as raw:
            for number, line in enumerate(_lines(path, raw), start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise UserError(f"{path}, line {number:,}, is not UTF-8; convert the file to UTF-8") from None
                if number % 1000 == 0:
                    on_bytes(before + raw.tell())
                text = text.rstrip("\r\n")
                blank = blank and not text.strip()
                yield text
        before += path.stat().st_size
        on_bytes(before)
    if blank:
        raise UserError(f"{', '.join(map(str, files))}: no line has text; give files with text")


def _lines(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    opener = OPENERS.get(path.suffix)
    number = 0
    try:
        with opener(raw) if opener else nullcontext(raw) as file:
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise UserError(f"{path}, line {number:,}, is longer than {LONGEST_LINE >> 20} MiB; break it up")
                yield line
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"cannot read {path} after line {number:,} ({reason}); is the file whole?") from error
