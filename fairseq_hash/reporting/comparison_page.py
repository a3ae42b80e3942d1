"""The page of a comparison: tables, figures and their provenance."""

from collections.abc import Sequence

import pandas as pd

from fairseq_hash.reporting import comparison_table, page
from fairseq_hash.reporting.charts import figures_of
from fairseq_hash.reporting.comparison import COLUMNS, Comparison
from fairseq_hash.reporting.curves import learning_charts
from fairseq_hash.reporting.loads import load_charts, sorted_loads
from fairseq_hash.reporting.runs import Run
from fairseq_hash.reporting.scaling import scaling_charts

# Entries of a model's record about where it comes from, by their heading on the page.
PROVENANCE = {
    **comparison_table.MACHINE,
    **{"dictionary_fingerprint": "Dictionary fingerprint", "table_fingerprint": "Hash table fingerprint"},
}
# The figures by file, in the order of the page: heading, caption, and charts.
FIGURES = {
    "learning_curves.png": (
        "Learning curves",
        "Perplexity of the cross-entropy, by seed: strong lines are of validations, faint ones of the training.",
        learning_charts,
    ),
    "perplexity_by_experts.png": (
        "Perplexity by the number of experts",
        "Models that differ in their number of experts only, beside dense ones.",
        scaling_charts,
    ),
    "expert_loads.png": (
        "Load of the experts",
        "Each expert's share of the tokens over the uniform share, sorted. Hollow: validation at the end.",
        load_charts,
    ),
}


def comparison_page(comparison: Comparison, figures: dict[str, list[bytes]]) -> str:
    """Return the page as HTML.

    `figures` are, by file name, those for light and for dark screens, for browsers without scripts.
    """
    return page.render(comparison.title, subtitle(comparison.runs), sections(comparison, figures))


def subtitle(runs: Sequence[Run]) -> str:
    """Return the number of runs, when their models were built, and on which hardware."""
    dates = sorted(run.training.model["date"][:10] for run in runs)
    dated = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"{len(runs)} run{'s' if len(runs) > 1 else ''}, {dated}, on {_hardware(runs)}"


def sections(comparison: Comparison, figures: dict[str, list[bytes]]) -> list[str]:
    """Return the parts of the page under its heading."""
    of_models, runs = comparison.of_models, comparison.runs
    words = page.paragraphs(f"{comparison.caution}\n\n{comparison.legend}")
    parts = [page.section("Results", page.table(comparison_table.for_readers(of_models), label="Results"), words)]
    if comparison.reasons:
        parts.append(page.section("Left out", page.table(comparison.left_out, words=True, label="Runs left out")))
    if comparison.note.strip():
        parts.append(page.section("What this shows and what not", page.paragraphs(comparison.note)))
    for name, (heading, caption, charts_of) in FIGURES.items():
        if drawn := charts_of(comparison.models):
            pictures = page.figure(caption, caption, *figures[name]) if name in figures else ""
            parts.append(page.section(heading, page.paragraphs(caption), figures_of(drawn), pictures))
    layers = comparison_table.layers_for_readers(of_models)
    if len(layers):
        has_loads = any(sorted_loads(runs) for runs in comparison.models.values())
        unlogged = "" if has_loads else "No figure: the runs did not log it (--log-expert-loads)."
        parts.append(
            page.section("Sparse layers", page.paragraphs(unlogged), page.table(layers, label="Sparse layers"))
        )
    parts.append(page.section("How the columns are measured", page.paragraphs(COLUMNS)))
    parts.append(page.section("Where this comes from", page.table(_provenance(runs), words=True, label="Provenance")))
    commands = {run.folder: run.record["commands"] for run in runs if "commands" in run.record}
    if commands:
        parts.append(page.section("The exact commands", page.commands(commands)))
    return parts


def _hardware(runs: Sequence[Run]) -> str:
    machines = {}
    for run in runs:
        record = run.training.model
        gpus = f"{len(record['gpus'])} x {record['gpus'][0]}, " if record["gpus"] else ""
        machines[f"{gpus}{record['processor']}, {record['cores']} cores"] = None
    return "; ".join(machines)


def _provenance(runs: Sequence[Run]) -> pd.DataFrame:
    """Return the entries of the runs' records, each different value once."""
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
