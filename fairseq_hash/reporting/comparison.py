"""A comparison: the runs that may be compared, by model, their tables, and the words beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fairseq_hash.errors import UserError
from fairseq_hash.reporting import published, table
from fairseq_hash.reporting.compare import sort_out
from fairseq_hash.reporting.naming import group_by_model
from fairseq_hash.reporting.noise import words_on_noise
from fairseq_hash.reporting.runs import Run, load_runs

COLUMNS = """
Perplexity is per token of the dictionary, of the cross-entropy alone, as fairseq-eval-lm printed it (where no run was
evaluated: of the training's last validation); with more than one seed it is the mean ± the sample standard deviation.
Active parameters are those that one token uses. Tokens/s is the median over the training's log intervals without the
first tenth, updates/s as well; the time is all of the training, validation included. Peak memory is that of the first
rank, of its GPU where there is one. Max load is the largest demand for an expert over the
mean demand (1 is even), in the first table of the worst layer: in training the mean over log intervals, in validation
at the end. Load variation is the coefficient of variation. Dropped is the share of training tokens that found their
expert full.
"""


@dataclass(frozen=True)
class Comparison:
    """What a report says, before it is written in any form.

    Attributes:
        title: the heading.
        note: what these runs can show, in the words of who made them.
        models: the compared runs by the name of their model.
        reasons: why each other run is left out, by its folder.
        of_runs: one row a run.
        of_models: one row a model.
        caution: what the seeds say of chance.
        legend: what the marks of published figures mean, "" without any.
    """

    title: str
    note: str
    models: dict[str, list[Run]]
    reasons: dict[Path, str]
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
        """The other runs with the reason."""
        return pd.DataFrame([(str(folder), why) for folder, why in self.reasons.items()], columns=["Run", "Why"])


def compare(folders: Sequence[Path], title: str, note: str = "") -> Comparison:
    """Read and compare the runs in folders and below them. Raises `UserError` where no run can be compared."""
    runs = load_runs(folders)
    compared, reasons = sort_out(runs)
    if not compared:
        folder, reason = next(iter(reasons.items()))
        raise UserError(f"no run can be reported; the first of {len(runs)}, {folder}: {reason}")
    models = group_by_model(compared)
    of_runs = table.table_of_runs(models)
    of_models = published.with_published(table.table_of_models(of_runs), models)
    caution, legend = words_on_noise(of_models), published.legend(models)
    return Comparison(title, note, models, reasons, of_runs, of_models, caution, legend)
