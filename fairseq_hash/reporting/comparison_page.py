"""The page of a comparison: tables, figures, and where they come from."""

from collections.abc import Sequence

import pandas as pd

from fairseq_hash.reporting import page, table
from fairseq_hash.reporting.comparison import COLUMNS, Comparison
from fairseq_hash.reporting.runs import Run

# What a model's record says of the machine and the libraries, by its heading on the page.
PROVENANCE = {
    **{"fairseq_hash": "fairseq_hash", "commit": "Commit", "python": "Python", "torch": "torch", "fairseq": "fairseq"},
    **{"processor": "Processor", "cores": "Usable cores", "gpus": "GPUs", "platform": "Platform"},
    **{"dictionary_fingerprint": "Dictionary fingerprint", "table_fingerprint": "Hash table fingerprint"},
}
# The figures by their files, in the order of the page.
FIGURES = {
    "learning_curves.png": ("Learning curves", "Perplexity of the cross-entropy, every seed a line."),
    "perplexity_by_experts.png": (
        "Perplexity by the number of experts",
        "Models that differ in their number of experts only, beside dense ones.",
    ),
    "expert_loads.png": ("Load of the experts", "Each expert's share of the tokens over the uniform share, sorted."),
}


def comparison_page(comparison: Comparison, figures: dict[str, list[bytes]]) -> str:
    """Return the page as HTML.

    Args:
        comparison: what to show.
        figures: each figure for light and for dark screens, by the name of its file.
    """
    of_models, runs = comparison.of_models, comparison.runs
    words = page.paragraphs(f"{comparison.caution}\n\n{comparison.legend}")
    parts = [page.section("Results", page.table(table.for_readers(of_models)), words)]
    if comparison.reasons:
        parts.append(page.section("Left out", page.table(comparison.left_out, words=True)))
    if comparison.note.strip():
        parts.append(page.section("What this shows and what not", page.paragraphs(comparison.note)))
    for name, (heading, caption) in FIGURES.items():
        if name in figures:
            parts.append(page.section(heading, page.figure(caption, caption, *figures[name])))
    layers = table.layers_for_readers(of_models)
    if len(layers):
        unlogged = "" if "expert_loads.png" in figures else "No figure: the runs did not log it (--log-expert-loads)."
        parts.append(page.section("Sparse layers", page.paragraphs(unlogged), page.table(layers)))
    parts.append(page.section("How the columns are measured", page.paragraphs(COLUMNS)))
    parts.append(page.section("Where this comes from", page.table(_provenance(runs), words=True)))
    commands = {run.folder: run.record["commands"] for run in runs if "commands" in run.record}
    if commands:
        parts.append(page.section("The exact commands", page.commands(commands)))
    dates = sorted(run.training.model["date"][:10] for run in runs)
    dated = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    return page.render(comparison.title, f"{count}, {dated}, on {_hardware(runs)}", parts)


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
