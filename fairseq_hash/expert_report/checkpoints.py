"""The checkpoints of a run folder, by the updates after which they were saved."""

from pathlib import Path

from fairseq_hash.checkpoint.loading import read_checkpoint
from fairseq_hash.core.errors import UserError
from fairseq_hash.reporting.charts import some

MOST = 12  # checkpoints of a run that are looked at, from the first to the last


def checkpoint_of(folder: Path, which: str) -> Path:
    """Return `checkpoint_WHICH.pt` of a run, best or last; for best, the last one where there is no best one.

    Raises:
        UserError: if there is none.
    """
    path = folder / f"checkpoint_{which}.pt"
    if which == "best" and not path.is_file():
        path = folder / "checkpoint_last.pt"
    if not path.is_file():
        others = sorted(other.name for other in folder.glob("checkpoint*.pt"))
        found = f"it has {', '.join(others[:3])}" if others else "it has no checkpoint at all"
        raise UserError(f"{folder} has no {path.name}; {found}; give the folder of a run that saved one (--save-dir)")
    return path


def by_update(folder: Path, main: Path) -> dict[int, Path]:
    """Return some of a run's checkpoints by ascending update; `main` is among them.

    Of several with the same update it is `main`, or the first by name.

    Raises:
        UserError: if one of them is damaged.
    """
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("checkpoint*.pt")):
        found.setdefault(updates_of(path), path)
    update = updates_of(main)
    return dict(sorted({**dict(some(sorted(found.items()), MOST)), update: main}.items()))


def updates_of(path: Path) -> int:
    """Return the number of updates after which a checkpoint was saved.

    Raises:
        UserError: if it does not say so.
    """
    history = read_checkpoint(path, is_checked=False).get("optimizer_history")
    try:
        return int(history[-1]["num_updates"])
    except (TypeError, LookupError, ValueError):
        raise UserError(
            f"{path} does not say after how many updates it was saved; give a run of fairseq-train"
        ) from None
