"""The report of a study, as files and for the terminal: a function of its definition and of its records."""

from collections.abc import Mapping
from pathlib import Path

from fairseq_hash.core.files import write_folder
from fairseq_hash.reporting import page
from fairseq_hash.reporting.charts import figures_of
from fairseq_hash.reporting.comparison_table import markdown
from fairseq_hash.reporting.drawing import draw
from fairseq_hash.reporting.theme import DARK, LIGHT
from fairseq_hash.studies.csv_tables import curves_csv, pairs_csv, results_csv, runs_csv, tuning_csv
from fairseq_hash.studies.definition import Study
from fairseq_hash.studies.leads import comparison_verdicts, lead_verdicts
from fairseq_hash.studies.ngram_lines import beside_longer_ngrams, beside_the_trigram
from fairseq_hash.studies.parts import Part, parts_of
from fairseq_hash.studies.records import RunRecord, TextFacts
from fairseq_hash.studies.results import gather, missing_runs, oracles
from fairseq_hash.studies.schedule import Run
from fairseq_hash.studies.tables import main_table

OF_TERMINAL = ["Model", "Test perplexity", "Test bits per byte", "Learning rate", "Seeds", "Active", "Tokens/s"]


def write_study_report(study: Study, facts: TextFacts, done: Mapping[Run, RunRecord], out: Path) -> list[Path]:
    """Write results.md, five CSV files, index.html and its pictures; return their paths.

    results.csv: a row a model, and one an n-gram model. runs.csv and tuning.csv: a row a run. curves.csv: a row a
    validation. pairs.csv: a row a pair of models that is judged.

    Of a study that is not complete, the report has what is there, and says what is missing.
    """
    results = gather(study, facts, done)
    verdicts = lead_verdicts(results)
    parts = parts_of(results, verdicts)
    figures = {part.picture: [draw(part.charts, theme) for theme in (LIGHT, DARK)] for part in parts if part.charts}
    files = {
        "results.md": _markdown(study, parts).encode(),
        "results.csv": results_csv(results, verdicts),
        "runs.csv": runs_csv(results),
        "tuning.csv": tuning_csv(results),
        "curves.csv": curves_csv(results),
        "pairs.csv": pairs_csv(results),
        "index.html": page.render(study.title, study.question, [_html(part, figures) for part in parts]).encode(),
    }
    return write_folder(out, files | {name: light for name, (light, _) in figures.items()})


def study_summary(study: Study, facts: TextFacts, done: Mapping[Run, RunRecord]) -> str:
    """Return the main table, the verdicts and what is missing as plain text for the terminal."""
    results = gather(study, facts, done)
    table = main_table(results)
    shown = table[[name for name in OF_TERMINAL if name in table]]
    # pandas aligns text on the right.
    shown = shown.assign(Model=shown["Model"].str.ljust(shown["Model"].str.len().max()))
    lines = [study.title, "", shown.to_string(index=False), ""]
    lines += [f"{verdict.words()}." for verdict in lead_verdicts(results).values()]
    lines += [f"{verdict.words()}." for verdict in comparison_verdicts(results)]
    lines += [line for line in (beside_the_trigram(results), beside_longer_ngrams(results), oracles(results)) if line]
    lines += [f"Missing: {name}: {lack}." for name, lack in missing_runs(results)]
    return "\n".join(lines).strip() + "\n"


def _markdown(study: Study, parts: list[Part]) -> str:
    blocks = [f"# {study.title}", study.question.strip()]
    blocks.append(
        "With all digits, beside this file: `results.csv`, `runs.csv`, `tuning.csv`, `curves.csv` (every validation, "
        "by tokens, seconds and FLOPs) and `pairs.csv`. `fairseq-hash study STUDY --report` draws `index.html` from "
        "the records."
    )
    for part in parts:
        table = "" if part.table is None or part.table.empty else markdown(part.table, part.is_words)
        if not table and not part.after:
            continue  # only charts, which are on the page
        blocks += [f"## {part.heading}", part.words, table, part.after]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _html(part: Part, figures: Mapping[str, list["bytes | None"]]) -> str:
    blocks = [page.paragraphs(part.words)]
    if part.table is not None and not part.table.empty:
        blocks.append(page.table(part.table, part.is_words, part.heading))
    if part.charts:
        light, dark = (png for png in figures[part.picture] if png is not None)
        blocks += [figures_of(part.charts), page.figure(part.heading, part.words, light, dark)]
    return page.section(part.heading, *blocks, page.paragraphs(part.after))
