"""The folder of a training's checkpoints: one training at a time, no leftovers, no start from scratch by mistake."""

import errno
import fcntl
import functools
import logging
import os
import re
import socket
from pathlib import Path
from typing import IO

from fairseq_hash.checkpoint.mainfile import not_here, read_main
from fairseq_hash.checkpoint.manifest import Manifest
from fairseq_hash.core.errors import UserError
from fairseq_hash.provenance import now

logger = logging.getLogger(__name__)

SHARDS = "experts"  # the folder of the shards, beside the main files
LOCK = "training.lock"
SHARD_NAME = re.compile(r"update-\d+\.[0-9a-f]{8}\.(weights|optimizer)\.\d+-\d+\.safetensors")
# As `atomic_write` names them, and as earlier versions did: without eight digits.
PARTIAL_NAME = re.compile(rf"\.({SHARD_NAME.pattern}|checkpoint.*\.pt|crash\.pt)(\.[0-9a-f]{{8}})?\.partial")

_locks: dict[Path, IO[str]] = {}


def shard_name(update: int, save: str, part: str, experts: range) -> str:
    """Return the path of a shard, relative to the folder of the main files."""
    return f"{SHARDS}/update-{update}.{save}.{part}.{experts[0]}-{experts[-1]}.safetensors"


def lock(folder: Path) -> None:
    """Keep other trainings out of a folder for as long as this process lives, however it ends.

    Raises:
        UserError: where another training has it.
    """
    path = (folder / LOCK).absolute()
    if path in _locks:
        return
    file = path.open("a+")
    try:
        # Not flock: processes that this one starts would hold the lock after its death.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"--save-dir {folder} is in use by another training ({holder}); wait for its end or give another "
                "--save-dir"
            ) from None
        logger.warning("%s cannot be locked (%s): nothing keeps a second training out of it", path, error.strerror)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {now()}\n")
    file.flush()
    _locks[path] = file


def clean(folder: Path) -> None:
    """Remove what saves that did not end have left: partial files, and shards without a main file.

    Only for who has the lock, and while no rank writes.
    """
    places = [place for place in (folder, folder / SHARDS) if place.is_dir()]
    partial = [path for place in places for path in place.iterdir() if PARTIAL_NAME.fullmatch(path.name)]
    removed = [*partial, *_unreferenced(folder)]
    for path in removed:
        path.unlink(missing_ok=True)
    if removed:
        logger.info("removed %d files of saves that did not end from %s", len(removed), folder)


def collect(folder: Path) -> None:
    """Remove the shards that no main file refers to any more; only for who has the lock, and while no rank writes."""
    try:
        for path in _unreferenced(folder):
            path.unlink(missing_ok=True)
    except OSError as error:  # they are still there after the next save
        logger.warning("old shards in %s cannot be removed (%s)", folder, error)


def _unreferenced(folder: Path) -> list[Path]:
    """Return the shards in a folder that no main file names; none where a main file cannot be read."""
    shards = folder / SHARDS
    if not shards.is_dir():
        return []
    referenced: set[str] = set()
    for path in folder.glob("*.pt"):
        if not path.is_file():  # a link to nothing refers to nothing
            continue
        facts = path.stat()
        try:
            manifest = _manifest(path, facts.st_ino, facts.st_mtime_ns, facts.st_size)
        except UserError as error:
            logger.warning("%s; what it refers to is not known, and no shard is removed", error)
            return []
        if manifest is not None:
            referenced.update(Path(shard.file).name for shard in manifest.shards)
    return [path for path in shards.iterdir() if SHARD_NAME.fullmatch(path.name) and path.name not in referenced]


@functools.lru_cache(1000)
def _manifest(path: Path, *_facts: int) -> "Manifest | None":
    """Return what a main file says; read once for the same facts of the file, however many saves come after it."""
    return Manifest.of(read_main(path, is_checked=False), path)


def check_start(folder: Path, path: Path, is_chosen: bool) -> None:
    """Check that a training that finds no checkpoint at `path` really is a new one.

    `path` is the checkpoint that it goes on from, `is_chosen` whether the user named it.

    Raises:
        UserError: where a chosen file does not exist, or where the folder has other checkpoints.
    """
    if path.is_file():
        return
    if is_chosen:
        raise UserError(f"{not_here(path)}; give an existing checkpoint, or leave the option out to start anew")
    others = sorted(other.name for other in folder.glob("checkpoint*.pt")) if folder.is_dir() else []
    if others or os.path.lexists(path):
        shown = ", ".join(others[:3]) + (" and more" if len(others) > 3 else "")
        raise UserError(
            f"{folder} has {shown or 'something'} but no usable {path.name} to go on from; give --restore-file with "
            "the checkpoint to go on from, or another --save-dir to start anew"
        )
