"""Whether what a command is to write can be written: asked before its work begins."""

import os
import tempfile
from pathlib import Path

from fairseq_hash.core.errors import UserError

PROBE = 1 << 20  # bytes; the first file of any training is larger


def require_folder(option: str, folder: "str | os.PathLike[str]") -> None:
    """Make a folder and its parents, given as an `option`, and write a file of 1 MiB there that is gone afterwards.

    Raises:
        UserError: where that fails: no permission, a read-only or full disc, a file in its place.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(PROBE))
            probe.flush()
            os.fsync(probe.fileno())
    except FileExistsError:
        raise UserError(f"{option} {folder} is a file; give a folder") from None
    except OSError as error:
        raise UserError(
            f"{option} {folder} cannot be written ({error.strerror}); give a folder that you may write to, on a disc "
            "with room"
        ) from error


def require_file(option: str, path: "str | os.PathLike[str]") -> None:
    """Open a file, given as an `option`, to append to it, as a log is; it is there afterwards.

    Raises:
        UserError: where that fails.
    """
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        raise UserError(
            f"{option} {path} cannot be written ({error.strerror}); give a file in a folder that exists"
        ) from error
