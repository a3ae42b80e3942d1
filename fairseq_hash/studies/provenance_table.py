"""The head and the origin of a study's report: its text and protocol, and who ran it."""

from collections import Counter

import pandas as pd

from fairseq_hash.provenance import LIBRARIES
from fairseq_hash.reporting.comparison_table import MACHINE, NOTHING, duration_text
from fairseq_hash.studies.results import Results

OF_RUNS = {**MACHINE, **{name: name for name in LIBRARIES if name not in MACHINE}}


def head_table(results: Results) -> pd.DataFrame:
    """Return the text and the protocol of a study."""
    study, facts = results.study, results.facts
    sizes = ", ".join(f"{split} {count:,}" for split, count in facts.tokens.items())
    grown = f", and up to {study.grow} more on each side while the best one is at an edge" if study.grow else ""
    rates = ", ".join(f"{rate:g}" for rate in study.learning_rates)
    tuned = f"{rates}{grown}; the best on valid with seed {study.tuning_seed}"
    seconds = sum(record.seconds for record in results.done.values())
    rows = [
        ("Text", f"{facts.name}, {facts.pieces:,} pieces"),
        ("Tokens", f"{sizes}; each of train is seen once"),
        ("Bytes per token of test", f"{facts.bytes['test'] / facts.tokens['test']:.3f}"),
        ("Parts of test", f"{len(facts.document_tokens):,} {facts.document_kind}"),
        ("Learning rates", tuned if len(study.learning_rates) > 1 else f"{rates}, not tuned"),
        ("Seeds of the final runs", ", ".join(map(str, study.seeds))),
        ("Runs so far", f"{len(results.done)}, {duration_text(seconds)} of training in all"),
    ]
    return pd.DataFrame(rows, columns=["What", "Value"])


def model_table(results: Results) -> pd.DataFrame:
    """Return what each model is: its configuration, and what is changed in it, in its evaluation or in its table."""
    rows = []
    for model in results.study.models.values():
        changes = [*model.overrides]
        if model.trained_as:
            changes.append(f"the trainings of {model.trained_as}, evaluated with {model.evaluation}")
        if model.table_of:
            changes.append(f"hash table made of {model.table_of}: tables {' '.join(model.table)}")
        rows.append((model.name, model.experiment or NOTHING, ", ".join(changes) or NOTHING))
    return pd.DataFrame(rows, columns=["Model", "Configuration", "Changes"])


def provenance_table(results: Results) -> pd.DataFrame:
    """Return the entries of the runs' provenance: each different value once, with its number of runs if they differ."""
    origins = [record.provenance for record in results.done.values()]
    rows = []
    for key, heading in OF_RUNS.items():
        values = (origin.get(key) for origin in origins)
        counts = Counter(", ".join(value) if isinstance(value, list) else str(value) for value in values if value)
        if len(counts) == 1:
            rows.append((heading, next(iter(counts))))
        elif counts:
            rows.append((heading, "; ".join(f"{value} ({count} runs)" for value, count in counts.most_common())))
    if dates := sorted(str(origin["date"]) for origin in origins if origin.get("date")):
        rows.append(("Dates (UTC)", dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"))
    rows.append(("Text fingerprint", results.facts.fingerprint))
    return pd.DataFrame(rows, columns=["What", "Value"])


def machines(results: Results) -> str:
    """Return a sentence if the final runs were made on different processors, "" if not."""
    runs = (record for result in results.finished for record in result.finals.values())
    found = {(str(run.provenance.get("processor")), str(run.provenance.get("gpus"))) for run in runs}
    if len(found) < 2:
        return ""
    return "The final runs were made on different processors, so tokens/s and times do not compare."
