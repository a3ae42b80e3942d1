"""Texts that a command line names."""

import sys
from pathlib import Path

from fairseq_hash.core.errors import UserError


def read_text(name: str) -> str:
    """Return the text of a file, or of standard input.

    Raises:
        UserError: if it cannot be read, is not UTF-8, or has no word.
    """
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise UserError(
            f"{name} cannot be read ({error.strerror}); give a file of text, or - for standard input"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start:,}); give a file of text") from None
    if not text.strip():
        raise UserError(f"{'standard input' if name == '-' else name} is empty; give some text")
    return text
