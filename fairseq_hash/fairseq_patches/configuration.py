"""What a user got wrong before anything is built: options that do not exist, data that is not there."""

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf.errors import ConfigKeyError, ValidationError

from fairseq_hash.core.errors import UserError
from fairseq_hash.fairseq_patches.registry import apply, override
from fairseq_hash.hashing.dictionary import read_dictionary


@override("fairseq.dataclass.utils", "merge_with_parent", one_line=True)
def _name_unknown_options(original: Callable[..., Any], known: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
    """Say in one line which option of a Hydra configuration does not exist, or has a value of another type.

    Upstream: `add_defaults` in fairseq/dataclass/initialize.py merges what is given with a dataclass, whose error
    (`ConfigKeyError`) shows as a traceback.
    """
    try:
        return original(known, given, *args, **kwargs)
    except ConfigKeyError as error:
        names = list(known.__dataclass_fields__)
        near = difflib.get_close_matches(str(error.key), names, n=3)
        hint = f"near: {', '.join(near)}" if near else f"known are {', '.join(names)}"
        raise UserError(f"{given._get_full_key(error.key)} is no option; {hint}") from error
    except ValidationError as error:
        line = str(error).splitlines()[0]
        raise UserError(f"{given._get_full_key(error.key)}={given.get(error.key)}: {line}") from error


@override("fairseq.utils", "import_user_module", one_line=True)
def _know_this_package(original: Callable[..., None], args: Any) -> None:
    """Take `--user-dir fairseq_hash` for this package, which has been imported, wherever the command runs.

    Upstream: names are compared as text, so that a link to the folder, or the name alone in another folder, is a
    traceback.
    """
    apply()  # the commands call this first, when their own module is imported
    given, own = getattr(args, "user_dir", None), Path(__file__).parent.parent
    if given is None or Path(given).name != own.name:
        return original(args)
    if Path(given).exists() and not own.samefile(given):
        raise UserError(f"--user-dir {given} is another copy than {own}, which is imported already; give that one")
    if not Path(given).exists() and given != own.name:
        raise UserError(f"--user-dir {given} does not exist; fairseq_hash is in {own}")
    return None


@override("fairseq.tasks.language_modeling.LanguageModelingTask", "setup_dictionary", one_line=True)
def _name_missing_data(original: Callable[..., Any], cfg: Any, **kwargs: Any) -> Any:
    """Say in one line that a folder holds no binarized data, or a dictionary that cannot be read.

    Upstream: `Dictionary.load` raises `FileNotFoundError`, or another error where a line is no symbol and its count or
    repeats a symbol, which shows as a traceback.
    """
    try:
        return original(cfg, **kwargs)
    except FileNotFoundError as error:
        raise UserError(
            f"{cfg.data} holds no binarized data (no {error.filename}); give a folder that fairseq-hash data or "
            "fairseq-preprocess made"
        ) from error
    except (RuntimeError, ValueError) as error:
        path = Path(cfg.data.split(os.pathsep)[0]) / "dict.txt"
        read_dictionary(path)  # it names the line
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


@override("fairseq.tasks.language_modeling.LanguageModelingTask", "load_dataset", one_line=True)
def _name_missing_subset(
    original: Callable[..., Any], task: Any, split: str, epoch: int = 1, *args: Any, **kwargs: Any
) -> Any:
    """Say in one line that a folder lacks a subset, the one of this epoch where there are several.

    Upstream: it is a traceback.
    """
    try:
        return original(task, split, epoch, *args, **kwargs)
    except FileNotFoundError as error:
        folders = task.args.data.split(os.pathsep)
        folder = folders[(epoch - 1) % len(folders)]
        raise UserError(
            f"{folder} has no subset {split} (no {split}.bin and {split}.idx); prepare the data with it, or name "
            "another one (--train-subset, --valid-subset, --gen-subset)"
        ) from error
