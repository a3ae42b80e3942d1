"""Names of run folders: what a run was given at the command line, as one name that no shell takes for more.

Hydra imports this file for `hydra.callbacks` in configs/base.yaml, before it makes a folder, in each of its processes.
"""

import hashlib
import re

from hydra.experimental.callback import Callback
from omegaconf import OmegaConf

LONGEST = 200  # characters; file systems take 255 bytes


def folder_name(overrides: str) -> str:
    """Return Hydra's `override_dirname` without what a shell takes for a pattern, a quote or an end.

    Brackets and quotes go: `optimization.lr=[0.1,0.2]` is `optimization.lr=0.1,0.2`. What else is not plain becomes
    `_`, and too long a name ends early; so that two runs never share a folder, a sum of the whole is put behind then.
    """
    kept = re.sub(r"[\[\]'\"]", "", overrides)
    plain = re.sub(r"[^a-zA-Z0-9_.,=+@%/-]", "_", kept)
    if plain == kept and len(plain) <= LONGEST:
        return plain
    return f"{plain[:LONGEST]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"


class NamesFolders(Callback):
    """Does nothing: that Hydra imports it is what counts."""


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
