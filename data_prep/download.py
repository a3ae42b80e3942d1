"""Downloads: a remote file arrives complete and checked, or not at all."""

import fcntl
import http.client
import io
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.fields import fits
from fairseq_hash.core.json_text import parse_object
from fairseq_hash.provenance import __version__, sha256_of_file

TIMEOUT = 60.0  # seconds in which a server must connect, and then send something
ATTEMPTS = 5  # attempts in a row that bring nothing new
PAUSE = 0.5  # seconds before the second attempt; doubled before every further one
BLOCK = 1 << 18  # bytes

OnProgress = Callable[[int, int | None], None]

OTHERWISE = "or get it by other means and use --local PATH"


@dataclass(frozen=True)
class RemoteFile:
    """A file at a public address. `size` (bytes) and `sha256` (hexadecimal digits): None if none is published."""

    url: str
    size: int | None
    sha256: str | None


class _Interrupted(Exception):
    """The connection failed or ended early; another attempt may succeed."""


def download(file: RemoteFile, path: Path, on_progress: OnProgress) -> Path:
    """Download `file` to `path` and return `path`. A file that exists already is checked and used.

    Received bytes are kept in `path` + `.partial` until the file is complete and checked. After an interruption the
    download continues from there, in this call or a later one, if the server confirms that the file is still the same
    (RFC 9110, section 13.1.5, If-Range). Otherwise it starts anew. Memory does not depend on the file's size.

    The folder of `path` is created if missing. `on_progress` is called with the bytes received so far and the total. It
    starts above 0 if a download continues, and falls back if one starts anew. Raises `UserError` if the file is not
    available, is not the published one, or cannot be written; if another file is at `path`; if another process is
    downloading to it.
    """
    partial = path.with_name(path.name + ".partial")
    sidecar = path.with_name(path.name + ".partial.json")
    try:
        if path.exists():
            if problem := mismatch(file, path):
                raise UserError(f"{path} {problem}; delete it to download {file.url}, {OTHERWISE}")
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(partial) as stream:
            try:
                _transfer(file, stream, sidecar, on_progress)
            except UserError:
                if not partial.stat().st_size:
                    partial.unlink()
                    sidecar.unlink(missing_ok=True)
                raise
            problem = mismatch(file, partial)
            sidecar.unlink(missing_ok=True)
            if problem:
                partial.unlink()
                raise UserError(f"{file.url} arrived damaged and was removed: it {problem}; run again, {OTHERWISE}")
            os.replace(partial, path)
    except OSError as error:  # errors of the disk: those of the network never get here
        raise UserError(
            f"{error.filename or partial}: {error.strerror}; fix that and run again, and the download continues from "
            "there"
        ) from error
    return path


def mismatch(file: RemoteFile, path: Path) -> str | None:
    """Return how the file at `path` differs from the published one; None if it does not, as far as can be checked."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"has {size} bytes, but {file.size} are expected"
    if file.sha256 is not None and (digest := sha256_of_file(path)) != file.sha256:
        return f"has the sha256 {digest}, but {file.sha256} is expected"
    return None


@contextmanager
def exclusive(path: Path) -> Iterator[io.FileIO]:
    """Open `path` for appending, unbuffered, for this process alone. The file is created if missing.

    Raises:
        UserError: if another process has it open in this way.
    """
    while True:
        with open(path, "ab", buffering=0) as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{path} is in use by another process; wait for its end and run again") from None
            if _is_still(stream, path):
                yield stream
                return


def _is_still(stream: io.FileIO, path: Path) -> bool:
    """Return whether the name still leads to the open file.

    The previous holder of the lock may have renamed or removed it.
    """
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _transfer(file: RemoteFile, stream: io.FileIO, sidecar: Path, on_progress: OnProgress) -> None:
    """Try until the file is complete, or until `ATTEMPTS` in a row have brought nothing new."""
    furthest, failures = stream.seek(0, os.SEEK_END), 0
    while True:
        try:
            return _attempt(file, stream, sidecar, on_progress)
        except _Interrupted as error:
            done = stream.seek(0, os.SEEK_END)
            failures = 1 if done > furthest else failures + 1
            furthest = max(furthest, done)
            if failures == ATTEMPTS:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"{file.url}: {reason} ({failures} attempts in a row brought nothing new); run again to continue "
                    f"after the {done} bytes that are here, {OTHERWISE}"
                ) from error
        time.sleep(PAUSE * 2 ** (failures - 1))


def _attempt(file: RemoteFile, stream: io.FileIO, sidecar: Path, on_progress: OnProgress) -> None:
    """Receive the missing bytes over one connection.

    The sidecar file says which remote file the bytes in `stream` belong to.
    """
    whole = _remembered(sidecar, file.url)
    done = stream.seek(0, os.SEEK_END) if whole["validator"] else 0
    if done and done == whole["total"]:
        return  # the last call was stopped between the last byte and the check
    part = {"Range": f"bytes={done}-", "If-Range": whole["validator"]} if done else {}
    with _open(file.url, part, sidecar) as response:
        validator = _validator(response.headers)
        if response.status == http.client.PARTIAL_CONTENT:
            # Some servers ignore If-Range, and parts of two different files must not be joined.
            span = rf"bytes {done}-\d+/{whole['total']}"
            if not re.fullmatch(span, response.headers.get("Content-Range", "")) or (
                validator not in (None, whole["validator"])
            ):
                sidecar.unlink(missing_ok=True)
                raise _Interrupted("the server sent a part of another file")
            total = whole["total"]
        else:
            done, total = 0, _length(file, response.headers)
            stream.truncate(0)
            sidecar.write_text(json.dumps({"url": file.url, "validator": validator, "total": total}))
        on_progress(done, total)
        for block in _blocks(response):
            _write(stream, block)
            done += len(block)
            on_progress(done, total)
    if done != total:
        raise _Interrupted(f"the server ended at {done} of {total} bytes")


def _remembered(sidecar: Path, url: str) -> dict[str, object]:
    """Return the sidecar's facts about the file at `url`; nothing if the sidecar is missing or damaged."""
    try:
        whole = parse_object(sidecar.read_text(encoding="utf-8"))
        validator, total = whole["validator"], whole["total"]
        # A validator is sent in a header.
        is_sound = fits(validator, str) and validator.isascii() and validator.isprintable() and fits(total, int)
        if whole["url"] == url and is_sound:
            return {"validator": validator, "total": total}
    except (FileNotFoundError, ValueError, KeyError):
        pass
    return {"validator": None, "total": None}


def _open(url: str, headers: dict[str, str], sidecar: Path) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers={"User-Agent": f"fairseq_hash/{__version__}", **headers})
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            sidecar.unlink(missing_ok=True)  # so the next attempt starts anew
        elif error.code < 500 and error.code not in (http.client.REQUEST_TIMEOUT, http.client.TOO_MANY_REQUESTS):
            raise UserError(
                f"{url}: the server answers {error.code} {error.reason}; try again later, {OTHERWISE}"
            ) from error
        raise _Interrupted(f"the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(getattr(error, "reason", error)) from error


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield the bytes as they arrive: `read` would lose those of an unfinished block if the connection breaks."""
    while True:
        try:
            block = response.read1(BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise _Interrupted(error) from error
        if not block:
            return
        yield block


def _write(stream: io.FileIO, block: bytes) -> None:
    """Write a whole block: an unbuffered file may take less at a time, and raises an error when the disk is full."""
    rest = memoryview(block)
    while rest:
        rest = rest[stream.write(rest) :]


def _validator(headers: Message) -> str | None:
    """Return the value for If-Range: the entity tag, unless it is weak, or else the date (RFC 9110, 13.1.5)."""
    tag = headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


def _length(file: RemoteFile, headers: Message) -> int:
    """Return the length of the whole file in bytes, as the server says it; checked if the length is published."""
    stated = headers.get("Content-Length", "")
    total = int(stated) if re.fullmatch("[0-9]{1,18}", stated) else file.size
    if total is None:
        raise UserError(f"{file.url}: the server does not say how long the file is; try again later, {OTHERWISE}")
    if file.size not in (None, total):
        raise UserError(
            f"{file.url}: the server offers {total} bytes, but {file.size} are expected; see whether a proxy or a "
            f"login page answers instead, {OTHERWISE}"
        )
    return total
