"""A comparison: the runs that may be compared, by model, their tables, and the texts beside them."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fairseq_hash.core.errors import UserError
from fairseq_hash.reporting import comparison_table, published
from fairseq_hash.reporting.compare import sort_out
from fairseq_hash.reporting.folders import find_failed_starts
from fairseq_hash.reporting.naming import group_by_model
from fairseq_hash.reporting.runs import Run, load_runs

COLUMNS = """
Perplexity is per token of the dictionary, from the cross-entropy alone, as fairseq-eval-lm printed it. If it is marked
(training), it is that of the best validation in training, the one of checkpoint_best.pt. With more than one seed it is
the mean ± the sample standard deviation. Active parameters are those that one token uses. Tokens/s and updates/s are
medians over the training's log intervals without the first tenth; the time is that of the whole training, validation
included. Peak memory is that of the first rank, on its GPU if it has one. Max load is the largest demand for an expert
divided by the mean demand (1 is even); the first table has the worst layer. In training it is the mean over log
intervals, in validation the last value. Load variation is the coefficient of variation. Dropped is the share of
training tokens that found their expert full.
"""


# Number of reasons to report if no run can be compared.
MOST_REASONS = 5


@dataclass(frozen=True)
class Comparison:
    """The content of a report, before it is written in any form.

    Attributes:
        title: the heading.
        note: what these runs can show, in the user's words.
        models: the compared runs by the name of their model.
        reasons: why a run or an evaluation is left out; by folder, or by `FOLDER, evaluation on SUBSET`.
        of_runs: one row per run.
        of_models: one row per model.
        caution: which differences may be chance, judged by the seeds.
        legend: what the marks of published figures mean, "" without any.
    """

    title: str
    note: str
    models: dict[str, list[Run]]
    reasons: dict[str, str]
    of_runs: pd.DataFrame
    of_models: pd.DataFrame
    caution: str
    legend: str

    @property
    def runs(self) -> list[Run]:
        """The compared runs, in the order of the models."""
        return [run for runs in self.models.values() for run in runs]

    @property
    def left_out(self) -> pd.DataFrame:
        """The runs and evaluations that are left out, with the reason."""
        return pd.DataFrame(list(self.reasons.items()), columns=["Run", "Why"])

    @property
    def summary(self) -> list[str]:
        """What is compared and what is left out, as lines for a terminal."""
        compared = f"compared {_number(len(self.runs), 'run')} of {_number(len(self.models), 'model')}"
        reasons = [f"left out: {what}: {why}" for what, why in self.reasons.items()]
        return [f"{compared}, left out {len(reasons)}" if reasons else compared, *reasons]


def compare(folders: Sequence[Path], title: str, note: str = "", unfinished: bool = False) -> Comparison:
    """Read and compare the runs in folders and below them; with `unfinished`, also those whose training is not done.

    Raises `UserError` if no run can be compared.
    """
    runs = load_runs(folders)
    compared, left_out = sort_out(runs, unfinished)
    if not compared:
        first = [f"{folder}: {reason}" for folder, reason in list(left_out.items())[:MOST_REASONS]]
        more = [f"and {len(runs) - len(first)} more"] if len(runs) > len(first) else []
        raise UserError(f"no run can be reported; {'; '.join([*first, *more])}")
    models = group_by_model(compared)
    reasons = {str(folder): reason for folder, reason in (find_failed_starts(folders) | left_out).items()}
    reasons |= _faults(compared)
    of_runs = comparison_table.table_of_runs(models)
    of_models = published.with_published(comparison_table.table_of_models(of_runs), models)
    caution, legend = words_on_noise(of_models), published.legend(models)
    return Comparison(title, note, models, reasons, of_runs, of_models, caution, legend)


def _faults(runs: Sequence[Run]) -> dict[str, str]:
    """Return why results of compared runs are left out."""
    faults = {}
    for run in runs:
        faults |= {f"{run.folder}, evaluation on {subset}": f"it {why}" for subset, why in run.faults.items()}
        if "valid" not in run.evaluations and (why := comparison_table.why_partial(run)):
            faults[f"{run.folder}, validation in training"] = why
    return faults


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def words_on_noise(models: pd.DataFrame) -> str:
    """Return a text that names the pairs of models whose difference is within two standard errors."""
    columns = [name for name in ("test_perplexity", "valid_perplexity") if name in models]
    if not columns:
        return "These runs were not evaluated."
    # A subset that all models have, if there is one.
    column = next((name for name in columns if models[name].notna().all()), columns[0])
    subset = column.removesuffix("_perplexity")
    rows = models[models[column].notna()].to_dict("records")
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
