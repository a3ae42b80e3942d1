"""The report on runs: what is written, and the words around the figures."""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fairseq_hash.errors import UserError
from fairseq_hash.provenance import provenance
from fairseq_hash.reporting import page, plots, table
from fairseq_hash.reporting.runs import Run, load_runs, sort_out

# What a model's record says of the machine and the libraries, by its heading on the page.
PROVENANCE = {
    **{"fairseq_hash": "fairseq_hash", "commit": "Commit", "python": "Python", "torch": "torch", "fairseq": "fairseq"},
    **{"processor": "Processor", "cores": "Usable cores", "gpus": "GPUs", "platform": "Platform"},
    **{"dictionary_fingerprint": "Dictionary fingerprint", "table_fingerprint": "Hash table fingerprint"},
}
COLUMNS = """
Perplexity is per token of the dictionary, of the cross-entropy alone, as fairseq-eval-lm printed it (where no run was
evaluated: of the training's last validation); with more than one seed it is the mean ± the sample standard deviation.
Active parameters are those that one token uses. Tokens/s is the median over the training's log intervals without the
first tenth; the time is all of the training, validation included. Max load is the largest demand for an expert over the
mean demand (1 is even), in the first table of the worst layer: in training the mean over log intervals, in validation
at the end. Load variation is the coefficient of variation. Dropped is the share of training tokens that found their
expert full.
"""


def write_report(folders: Sequence[Path], out: Path, title: str, note: "Path | None" = None) -> list[Path]:
    """Write results.json, results.csv, results.md, the figures and index.html to a folder; return their paths.

    Raises `UserError` with one line for bad input, and where no run can be compared, before anything is written.
    """
    note_text = _read_note(note)
    runs = load_runs(folders)
    compared, reasons = sort_out(runs)
    if not compared:
        folder, reason = next(iter(reasons.items()))
        raise UserError(f"no run can be reported; the first of {len(runs)}, {folder}: {reason}")
    models = table.group_by_model(compared)
    of_runs = table.table_of_runs(models)
    of_models = table.table_of_models(of_runs)
    caution = words_on_noise(of_models)
    figures = {
        "learning_curves.png": [plots.learning_curves(models, theme) for theme in (plots.LIGHT, plots.DARK)],
        "expert_loads.png": [plots.expert_loads(models, theme) for theme in (plots.LIGHT, plots.DARK)],
    }
    figures = {name: drawn for name, drawn in figures.items() if drawn[0] is not None}
    files: dict[str, bytes] = {name: light for name, (light, _) in figures.items()}
    files["results.json"] = _json(title, of_models, of_runs, compared, reasons)
    files["results.csv"] = of_runs.to_csv(index=False).encode()
    files["results.md"] = _markdown(title, of_models, reasons, caution, note_text).encode()
    files["index.html"] = _page(title, of_models, figures, compared, reasons, caution, note_text).encode()
    return _write(out, files)


def _read_note(note: "Path | None") -> str:
    if note is None:
        return ""
    try:
        return note.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --note {note} ({error}); give a text file in UTF-8") from None


def _write(out: Path, files: dict[str, bytes]) -> list[Path]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            temporary = out / f"{name}.tmp"
            temporary.write_bytes(content)
            os.replace(temporary, out / name)
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}; give a folder that you can write to") from None
    return [out / name for name in files]


def words_on_noise(models: pd.DataFrame) -> str:
    """Return what the seeds say of chance: the pairs of models whose difference lies within two standard errors."""
    column = next((name for name in ("test_perplexity", "valid_perplexity") if name in models), None)
    if column is None:
        return "These runs were not evaluated."
    subset = column.removesuffix("_perplexity")
    rows = models.to_dict("records")
    if any(row["runs"] < 2 for row in rows):
        alone = [row["model"] for row in rows if row["runs"] < 2]
        return (
            f"One seed only of {_listed(alone)}: how much chance alone would change its perplexity is not known here."
        )
    if len(rows) < 2:
        return f"{rows[0]['runs']} seeds of {rows[0]['model']}; there is no other model to compare it with."
    close = []
    for one, other in itertools.combinations(rows, 2):
        error = math.sqrt(sum(row[f"{column}_sd"] ** 2 / row["runs"] for row in (one, other)))
        if abs(one[column] - other[column]) <= 2 * error:
            close.append(f"{one['model']} and {other['model']}")
    seeds = f"{min(row['runs'] for row in rows)} seeds a model"
    if not close:
        return f"With {seeds}, every difference in {subset} perplexity exceeds two standard errors."
    within = (
        f"With {seeds}, the difference in {subset} perplexity is within two standard errors, and may be chance, between"
    )
    return f"{within} {'; '.join(close)}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _json(
    title: str, of_models: pd.DataFrame, of_runs: pd.DataFrame, compared: Sequence[Run], reasons: dict[Path, str]
) -> bytes:
    def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
        return json.loads(frame.to_json(orient="records", double_precision=15))

    raw = {
        str(run.folder): {
            "record": run.record,
            "model": run.training.model,
            "config": run.training.config,
            "intervals": list(run.training.intervals.values()),
            "validations": list(run.training.validations.values()),
            "evaluations": {name: dataclasses.asdict(one) for name, one in run.evaluations.items()},
        }
        for run in compared
    }
    content = {"title": title, "report": provenance(), "models": records(of_models), "runs": records(of_runs)}
    content |= {"left_out": {str(folder): reason for folder, reason in reasons.items()}, "raw": raw}
    return json.dumps(_finite(content), indent=1, default=str).encode()


def _finite(content: Any) -> Any:
    """Return content with text for NaN and infinities, which JSON does not know."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content


def _left_out(reasons: dict[Path, str]) -> pd.DataFrame:
    return pd.DataFrame([(str(folder), reason) for folder, reason in reasons.items()], columns=["Run", "Why"])


def _markdown(title: str, of_models: pd.DataFrame, reasons: dict[Path, str], caution: str, note: str) -> str:
    parts = [f"# {title}", table.markdown(table.for_readers(of_models)), caution, " ".join(COLUMNS.split())]
    layers = table.layers_for_readers(of_models)
    if len(layers):
        parts += ["## Sparse layers", table.markdown(layers)]
    if reasons:
        parts += ["## Left out", table.markdown(_left_out(reasons), words=True)]
    if note.strip():
        parts += ["## What this shows and what not", note.strip()]
    return "\n\n".join(parts) + "\n"


def _page(
    title: str,
    of_models: pd.DataFrame,
    figures: dict[str, list[bytes]],
    compared: Sequence[Run],
    reasons: dict[Path, str],
    caution: str,
    note: str,
) -> str:
    parts = [page.section("Results", page.table(table.for_readers(of_models)), page.paragraphs(caution))]
    if reasons:
        parts.append(page.section("Left out", page.table(_left_out(reasons), words=True)))
    parts.append(page.section("What this shows and what not", page.paragraphs(note)) if note.strip() else "")
    captions = {
        "learning_curves.png": ("Learning curves", "Perplexity of the cross-entropy, every seed a line."),
        "expert_loads.png": (
            "Load of the experts",
            "Each expert's share of the tokens over the uniform share, sorted.",
        ),
    }
    for name, (heading, caption) in captions.items():
        if name in figures:
            parts.append(page.section(heading, page.figure(caption, caption, *figures[name])))
    layers = table.layers_for_readers(of_models)
    if len(layers):
        unlogged = "" if "expert_loads.png" in figures else "No figure: the runs did not log it (--log-expert-loads)."
        parts.append(page.section("Sparse layers", page.paragraphs(unlogged), page.table(layers)))
    parts.append(page.section("How the columns are measured", page.paragraphs(COLUMNS)))
    parts.append(page.section("Where this comes from", page.table(_provenance(compared), words=True)))
    commands = {run.folder: run.record["commands"] for run in compared if "commands" in run.record}
    if commands:
        parts.append(page.section("The exact commands", page.commands(commands)))
    dates = sorted(run.training.model["date"][:10] for run in compared)
    dated = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    count = f"{len(compared)} run{'s' if len(compared) > 1 else ''}"
    return page.render(title, f"{count}, {dated}, on {_hardware(compared)}", parts)


def _hardware(runs: Sequence[Run]) -> str:
    machines = {}
    for run in runs:
        record = run.training.model
        gpus = f"{len(record['gpus'])} x {record['gpus'][0]}, " if record["gpus"] else ""
        machines[f"{gpus}{record['processor']}, {record['cores']} cores"] = None
    return "; ".join(machines)


def _provenance(runs: Sequence[Run]) -> pd.DataFrame:
    """Return what the runs' records say, each different value once."""
    rows = []
    for key, heading in PROVENANCE.items():
        values = [run.training.model.get(key) for run in runs]
        shown = dict.fromkeys(", ".join(value) if isinstance(value, list) else str(value) for value in values if value)
        if shown:
            rows.append((heading, "; ".join(shown)))
    for key, heading in (("data", "Data"), ("data_fingerprint", "Data fingerprint")):
        shown = dict.fromkeys(str(run.record[key]) for run in runs if key in run.record)
        if shown:
            rows.append((heading, "; ".join(shown)))
    dates = sorted(run.training.model["date"] for run in runs)
    rows.append(("Models built (UTC)", f"{dates[0]} to {dates[-1]}"))
    return pd.DataFrame(rows, columns=["What", "Value"])
