"""Output files: checked before work begins, and whole under their names or not there at all."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError

from fairseq_hash.core.errors import UserError


def check_out(out: Path, overwrite: bool) -> None:
    """Raise `UserError` unless the file `--out` can be written."""
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file")
    if out.exists() and not overwrite:
        raise UserError(f"--out {out} exists; give another file, or add --overwrite to replace it")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"cannot write to the folder {out.parent}; give an --out that you can write")


def check_folder(out: Path) -> None:
    """Raise `UserError` where `--out`, a folder that is made where it is missing, is a file."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` write to another name, and give the file its own when all of it is there.

    Raises:
        UserError: where it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path} ({error}); give a file that you can write") from None
    finally:
        partial.unlink(missing_ok=True)


def write_folder(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write files to a folder, which is made where it is missing; return their paths."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {folder}: {error.strerror}; give another folder") from None
    for name, content in contents.items():
        write_whole(folder / name, lambda path, content=content: path.write_bytes(content))
    return [folder / name for name in contents]
