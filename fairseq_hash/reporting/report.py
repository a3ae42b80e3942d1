"""The report on runs, as files."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import write_folder
from fairseq_hash.provenance import provenance
from fairseq_hash.reporting import comparison_table
from fairseq_hash.reporting.comparison import COLUMNS, Comparison, compare
from fairseq_hash.reporting.comparison_page import FIGURES, comparison_page
from fairseq_hash.reporting.drawing import draw
from fairseq_hash.reporting.published import PUBLISHED
from fairseq_hash.reporting.runs import Run
from fairseq_hash.reporting.theme import DARK, LIGHT


def write_report(folders: Sequence[Path], out: Path, title: str, note: "Path | None" = None) -> list[Path]:
    """Compare runs and write what `write_comparison` writes; return the paths.

    Raises `UserError` with one line for bad input, or if no run can be compared, before anything is written.
    """
    return write_comparison(compare(folders, title, read_note(note)), out)


def write_comparison(comparison: Comparison, out: Path) -> list[Path]:
    """Write results.json, results.csv, runs.csv, results.md, the figures and index.html; return their paths."""
    charts = {name: charts_of(comparison.models) for name, (_, _, charts_of) in FIGURES.items()}
    figures = {name: [draw(own, theme) for theme in (LIGHT, DARK)] for name, own in charts.items() if own}
    files: dict[str, bytes] = {name: light for name, (light, _) in figures.items()}
    files["results.json"] = _json(comparison)
    files["results.csv"] = comparison.of_models.to_csv(index=False).encode()
    files["runs.csv"] = comparison.of_runs.to_csv(index=False).encode()
    files["results.md"] = _markdown(comparison).encode()
    files["index.html"] = comparison_page(comparison, figures).encode()
    return write_folder(out, files)


def read_note(note: "Path | None") -> str:
    """Return the text of a file, empty for None; raises `UserError` if it cannot be read."""
    if note is None:
        return ""
    try:
        return note.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --note {note} ({error}); give a text file in UTF-8") from None


def _json(comparison: Comparison) -> bytes:
    def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
        return json.loads(frame.to_json(orient="records", double_precision=15))

    content = {"title": comparison.title, "report": provenance(), "legend": comparison.legend}
    content |= {"models": records(comparison.of_models), "runs": records(comparison.of_runs)}
    content |= {"left_out": comparison.reasons}
    content["raw"] = {str(run.folder): _raw(run) for run in comparison.runs}
    return json.dumps(_finite(content), indent=1, default=str).encode()


def _raw(run: Run) -> dict[str, Any]:
    """Return everything in the logs. Published figures are among the models only, if they may be printed."""
    return {
        "record": run.record,
        "model": run.training.model,
        "config": {key: value for key, value in run.training.config.items() if not key.startswith(PUBLISHED)},
        "intervals": list(run.training.intervals.values()),
        "validations": list(run.training.validations.values()),
        "evaluations": {name: dataclasses.asdict(one) for name, one in run.evaluations.items()},
    }


def _finite(content: Any) -> Any:
    """Return content with NaN and infinities as text, because JSON does not have them."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content


def _markdown(comparison: Comparison) -> str:
    parts = [
        f"# {comparison.title}",
        comparison_table.markdown(comparison_table.for_readers(comparison.of_models)),
        comparison.caution,
    ]
    parts += [comparison.legend] if comparison.legend else []
    parts.append(" ".join(COLUMNS.split()))
    layers = comparison_table.layers_for_readers(comparison.of_models)
    if len(layers):
        parts += ["## Sparse layers", comparison_table.markdown(layers)]
    if comparison.reasons:
        parts += ["## Left out", comparison_table.markdown(comparison.left_out, words=True)]
    if comparison.note.strip():
        parts += ["## What this shows and what not", comparison.note.strip()]
    return "\n\n".join(parts) + "\n"
