"""Output files: checked before work begins, and whole under their names or not there at all."""

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fairseq_hash.core.errors import UserError

PARTIAL = ".partial"  # the end of a name until the file is whole


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


def check_file(option: str, path: "Path | None") -> None:
    """Raise `UserError` unless a file, which is replaced where it is there, can be written."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"{option} {path} cannot be written; give a file in a folder that exists")


def check_folder(out: Path) -> None:
    """Raise `UserError` if `--out`, a folder that is made where it is missing, is a file."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")


@contextmanager
def atomic_write(path: "str | os.PathLike[str]", is_durable: bool = False) -> Iterator[Path]:
    """Yield another name to write a file or a folder to; it gets its own name when all of it is there.

    Whatever fails, what had the name before is still there, and nothing else is. A process that is killed leaves
    `.NAME.xxxxxxxx.partial`.

    With `is_durable` a file is on disc before it has its name, and then the name, too.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        yield partial
        if is_durable:
            _sync(partial)
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
    if is_durable:
        with contextlib.suppress(OSError):  # not every file system can do that with a folder
            _sync(path.parent)


@contextmanager
def only_one(folder: Path, line: str) -> Iterator[None]:
    """Keep other processes that ask for the same folder out, until this one is done or has died.

    Raises:
        UserError: with `line`, if another process is in.
    """
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(line) from None
        yield


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partials(folder: Path) -> None:
    """Remove what killed writers have left in a folder and below it; only while nobody writes there."""
    for path in list(folder.rglob(f".*{PARTIAL}")):
        path.unlink()


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """Do what `atomic_write` does for a file that the user has named.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        with atomic_write(path) as partial:
            yield partial
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path} ({error}); give a file that you can write") from None


def write_folder(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write files, each whole or not at all, to a folder that is made where it is missing; return their paths.

    Raises:
        UserError: if that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            with atomic_write(folder / name) as partial:
                partial.write_bytes(content)
    except OSError as error:
        raise UserError(
            f"cannot write to --out {folder}: {error.strerror}; give a folder that you can write to"
        ) from None
    return [folder / name for name in contents]
