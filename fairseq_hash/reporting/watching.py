"""A page that is kept current while runs train."""

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import write_folder
from fairseq_hash.reporting import comparison_table, page
from fairseq_hash.reporting.comparison import Comparison, compare
from fairseq_hash.reporting.comparison_page import sections, subtitle
from fairseq_hash.reporting.comparison_table import NOTHING
from fairseq_hash.reporting.runs import Run

# Reading the logs takes at most 1 / PARTS of the time.
PARTS = 10


def watch(
    folders: Sequence[Path], out: Path, title: str, note: str, seconds: float, tell: Callable[[str], None]
) -> None:
    """Write `index.html` again and again, whole each time, until Ctrl-C.

    Runs whose training is not done are compared as far as they are. If no run can be reported yet, the page and `tell`
    say why, once for each reason, and reading continues: a half-written log will be completed.

    `seconds` is the time between two pages; it is longer if reading the logs takes long. `tell` is called with a line
    for the terminal.

    Raises:
        UserError: for a path that is not a folder, or if the page cannot be written.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give the folders that hold the runs' logs, or will")
    told = None
    try:
        while True:
            start = time.monotonic()
            html, fault = current_page(folders, title, note, seconds)
            (path,) = write_folder(out, {"index.html": html.encode()})
            line = f"waiting: {fault}" if fault else f"{path} is kept current every {seconds:g} s; Ctrl-C ends it"
            if line != told:
                tell(line)
                told = line
            time.sleep(max(seconds, (PARTS - 1) * (time.monotonic() - start)))
    except KeyboardInterrupt:
        tell(f"ended; {out / 'index.html'} is as it was written last")


def current_page(folders: Sequence[Path], title: str, note: str, seconds: float) -> tuple[str, str]:
    """Return the page as HTML, and why no run can be reported yet ("" if one can)."""
    now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    try:
        comparison = compare(folders, title, note, unfinished=True)
    except UserError as error:
        words = [page.section("Nothing to show yet", page.paragraphs(str(error)))]
        return page.render(title, f"as of {now}", words, seconds), str(error)
    parts = sections(comparison, {})
    if len(shown := progress(comparison)):
        parts.insert(0, page.section("Training now", page.table(shown, label="Progress of trainings")))
    return page.render(title, f"{subtitle(comparison.runs)}; as of {now}", parts, seconds), ""


def progress(comparison: Comparison) -> pd.DataFrame:
    """Return one row for each training that is not done, as text; empty if all are."""
    rows = [
        _progress_of(model, run)
        for model, runs in comparison.models.items()
        for run in runs
        if run.not_done is not None
    ]
    return pd.DataFrame(rows)


def _progress_of(model: str, run: Run) -> dict[str, Any]:
    last, validation = run.training.intervals[max(run.training.intervals)], comparison_table.last_validation(run)
    stop, updates = run.training.config.get("optimization.max_update") or 0, run.training.updates
    speed = last.get("ups") or 0
    return {
        "Run": str(run.folder),
        "Model": model,
        "Update": f"{updates:,}",
        "Of": f"{stop:,}" if stop else NOTHING,
        "Done": f"{updates / stop:.0%}" if stop else NOTHING,
        "Updates/s": f"{speed:.3g}" if speed else NOTHING,
        "Left": comparison_table.duration_text(max(0, stop - updates) / speed) if stop and speed else NOTHING,
        "Perplexity, training": f"{last['ppl']:.2f}" if "ppl" in last else NOTHING,
        "Perplexity, validation": f"{validation['ppl']:.2f}" if "ppl" in validation else NOTHING,
        "State": run.not_done,
    }
