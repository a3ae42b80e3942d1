"""The main file of a checkpoint: written whole or not at all, read without running code from it."""

import errno
import os
import pickle
import pickletools
import re
import shutil
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.fields import fits
from fairseq_hash.core.files import atomic_write

# How torch began its files before version 1.6: a pickle of a number.
OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# The kinds of the entries that fairseq writes.
KINDS = {
    "model": dict[str, torch.Tensor],
    "optimizer_history": list[dict[str, Any]],
    "extra_state": dict[str, Any],
    "last_optimizer_state": dict[str, Any],
}


def write_main(state: Mapping[str, Any], path: "str | os.PathLike[str]") -> None:
    """Write a checkpoint's main file: on disc and whole under its name, or not at all.

    Of the options in `cfg`, namespaces become dictionaries, as fairseq's older optimizers have them and no file can be
    read back with them unless code from it is run.

    Raises:
        UserError: if it cannot be written; what had this name before is still there, and nothing else is.
    """
    if state.get("cfg") is not None:
        state = {**state, "cfg": _plain(state["cfg"])}
    try:
        with atomic_write(path, is_durable=True) as partial, open(partial, "wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch says with a RuntimeError that its file is not whole
        raise UserError(cannot_write(path, error)) from error


def _plain(options: Any) -> Any:
    """Return options with dictionaries in the place of namespaces."""
    if isinstance(options, Namespace):
        options = vars(options)
    return {key: _plain(value) for key, value in options.items()} if isinstance(options, dict) else options


def cannot_write(path: "str | os.PathLike[str]", error: Exception) -> str:
    """Return the message for a file that cannot be written, such as on a full disc."""
    cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), error)
    what = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause).splitlines()[0]
    is_full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "make room" if is_full or not isinstance(cause, OSError) else "make the folder writable"
    if not Path(path).parent.is_dir():
        return f"{path} cannot be written: its folder is gone; bring it back, or give another --save-dir"
    return f"{path} cannot be written ({what}); earlier checkpoints are whole, {advice} and resume from them"


def duplicate(source: "str | os.PathLike[str]", target: "str | os.PathLike[str]") -> None:
    """Give a main file another name as well: a link, which takes no room, or a copy where there are no links.

    Main files are replaced, never changed, so two names of one file do not disturb each other.

    Raises:
        UserError: if the copy cannot be written.
    """
    try:
        with atomic_write(target, is_durable=True) as partial:
            try:
                os.link(source, partial)
            except OSError:
                shutil.copyfile(source, partial)
    except OSError as error:
        raise UserError(cannot_write(target, error)) from error


def is_url(path: "str | os.PathLike[str]") -> bool:
    """Return whether this is on another machine, such as https://... or s3://..., of which pathlib drops a slash."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)) is not None


def not_here(path: "str | os.PathLike[str]") -> str:
    """Return the message for a checkpoint that is no file of this machine."""
    if not is_url(path):
        return f"{path} does not exist"
    scheme, _, rest = os.fspath(path).partition(":")
    return (
        f"{scheme}://{rest.lstrip('/')} is no file of this machine; download it, with the folder experts/ beside it, "
        "and give its path"
    )


def read_main(path: "str | os.PathLike[str]", is_checked: bool = True) -> dict[str, Any]:
    """Read a main file, or any checkpoint of fairseq: tensors and plain values, memory-mapped.

    With `is_checked` all of it is compared with its checksums first (CRC-32, which torch writes).

    Raises:
        UserError: if it is missing, damaged, no checkpoint, or needs code from the file to be run.
    """
    if Path(path).is_dir():
        inside = [name for name in ("checkpoint_best.pt", "checkpoint_last.pt") if (Path(path) / name).is_file()]
        example = f", such as {Path(path) / inside[0]}" if inside else ""
        raise UserError(f"{path} is a folder; give the file of a checkpoint{example}")
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip and is_checked:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise UserError(f"{path} is damaged: its contents fail their checksums; use another checkpoint")
        # What torch wrote before version 1.6 is no archive and cannot be mapped.
        if not is_zip:
            _check_old(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except FileNotFoundError:
        raise UserError(not_here(path)) from None
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise UserError(
                f"{path} is not loaded, as that would run code from the file: {_reason(error)}; save it again as "
                "tensors and plain values"
            ) from error
        raise UserError(f"{path} is damaged or no checkpoint; use another checkpoint") from error
    except EOFError:
        raise UserError(f"{path} is damaged or no checkpoint (it ends too early); use another checkpoint") from None
    except UserError:
        raise
    except Exception as error:  # torch's reader of pickles raises whatever a damaged one leads to
        raise UserError(f"{path} is damaged or no checkpoint ({_reason(error)}); use another checkpoint") from error
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"{path} is no checkpoint: it has no model")
    _check_sizes(state, path)
    _check_kinds(state, path)
    return state


def _check_old(path: "str | os.PathLike[str]") -> None:
    """Raise `UserError` unless a file can be what torch wrote before version 1.6: four pickles, then the tensors' data.

    torch asks for the memory of a tensor before it looks for its data: here the number of its elements, the last number
    before its persistent id, is compared with the size of the file.
    """
    with open(path, "rb") as file:
        start = file.read(len(OLD))
        if start != OLD and OLD.startswith(start):
            raise EOFError
        if start != OLD:
            raise UserError(f"{path} is damaged or no checkpoint (torch did not write it); use another checkpoint")
        most, number = os.fstat(file.fileno()).st_size, 0
        # A damaged length, too, asks for memory.
        bounded: Any = SimpleNamespace(read=lambda size: file.read(min(size, most)), readline=file.readline)
        for _ in range(3):
            for operation, argument, _ in pickletools.genops(bounded):
                if isinstance(argument, int) and operation.name.startswith(("BININT", "INT", "LONG")):
                    number = argument
                elif operation.name == "BINPERSID" and number > most:
                    raise UserError(
                        f"{path} is damaged: a tensor of {number:,} elements is larger than the file; use another "
                        "checkpoint"
                    )


def _check_sizes(state: Any, path: "str | os.PathLike[str]") -> None:
    """Raise `UserError` for a tensor that is larger than its file: a few bytes can say to be any number of rows."""
    most = Path(path).stat().st_size
    waiting, seen = [state], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            if value.numel() * value.dtype.itemsize > most:
                raise UserError(
                    f"{path} is damaged: a tensor of shape {list(value.shape)} is larger than the file; use another "
                    "checkpoint"
                )
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))  # a pickle may hold itself
            waiting += [*value.keys(), *value.values()] if isinstance(value, dict) else value


def _check_kinds(state: Mapping[str, Any], path: "str | os.PathLike[str]") -> None:
    """Raise `UserError` where an entry that fairseq writes is of another kind."""
    for name, kind in KINDS.items():
        if (name == "model" or state.get(name) is not None) and not fits(state[name], kind):
            raise UserError(f"{path} is damaged or no checkpoint of fairseq (its {name}); use another checkpoint")


def _reason(error: Exception) -> str:
    """Return the line of torch's long messages that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    chosen = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0] if lines else "")
    return chosen.removeprefix("WeightsUnpickler error:").strip()[:200] or type(error).__name__
