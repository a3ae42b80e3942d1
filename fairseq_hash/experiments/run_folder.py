"""Names of run folders: the overrides of a run, as one name that needs no quotes in a shell.

Hydra imports this file for `hydra.callbacks` in configs/base.yaml, in each process, before it makes a folder.
"""

import hashlib
import re

from hydra.experimental.callback import Callback
from omegaconf import OmegaConf

LONGEST = 200  # characters; file systems take 255 bytes


def folder_name(overrides: str) -> str:
    """Return Hydra's `override_dirname` without characters that mean something to a shell.

    Brackets and quotes are removed: `optimization.lr=[0.1,0.2]` becomes `optimization.lr=0.1,0.2`. Other special
    characters become `_`, and a name that is too long is cut. In these two cases a checksum of the whole name is
    appended, so that two runs never share a folder.
    """
    kept = re.sub(r"[\[\]'\"]", "", overrides)
    plain = re.sub(r"[^a-zA-Z0-9_.,=+@%/-]", "_", kept)
    if plain == kept and len(plain) <= LONGEST:
        return plain
    return f"{plain[:LONGEST]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"


class NamesFolders(Callback):
    """Does nothing. Hydra imports this file because of it."""


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
