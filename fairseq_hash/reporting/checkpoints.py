"""Checks whether a run's checkpoint belongs to the model in its log, without reading a tensor."""

from pathlib import Path
from typing import TYPE_CHECKING

from fairseq_hash.core.errors import UserError
from fairseq_hash.reporting.runs import Run

if TYPE_CHECKING:
    from fairseq_hash.checkpoint.manifest import Manifest

# Entries of both a checkpoint's manifest and the model's record, by their name in words.
SAID_BY_BOTH = {
    "num_experts": "number of experts",
    "router": "router",
    "dictionary_fingerprint": "dictionary fingerprint",
    "table_fingerprint": "hash table fingerprint",
}
USUAL = ("checkpoint_best.pt", "checkpoint_last.pt")


def contradiction(run: Run) -> "str | None":
    """Return how the evaluated checkpoint (else the best or the last one) in the run's folder contradicts its log.

    None if it does not, if there is no such checkpoint, or if it has no manifest.
    """
    names = [*(evaluation.checkpoint for evaluation in run.evaluations.values()), *USUAL]
    path = next((run.folder / name for name in names if name and (run.folder / name).is_file()), None)
    manifest = _manifest(path) if path else None
    if path is None or manifest is None:
        return None
    record = run.training.model or {}
    for key, words in SAID_BY_BOTH.items():
        saved, logged = getattr(manifest, key), record.get(key)
        if None not in (saved, logged) and saved != logged:
            return f"the {words} is {_short(logged)} in its log, but {_short(saved)} in {path.name}"
    return None


def _manifest(path: Path) -> "Manifest | None":
    try:
        from fairseq_hash.checkpoint.mainfile import read_main
        from fairseq_hash.checkpoint.manifest import Manifest
    except ModuleNotFoundError:
        return None  # reports are made without torch, too
    try:
        return Manifest.of(read_main(path, is_checked=False), path)
    except UserError:
        return None  # the logs are enough without it


def _short(value: object) -> object:
    return value[:12] if isinstance(value, str) and len(value) == 64 else value
