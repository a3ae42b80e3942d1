"""Published figures that a run's experiment names. They were not measured here, so they stand apart with their mark."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fairseq_hash.core.errors import UserError
from fairseq_hash.reporting.runs import Run

PUBLISHED = "experiment.published."
BY_UPDATE = "valid_by_update"
FIGURE = re.compile(r"(\d{1,18}(?:\.\d+)?) ([A-Z])")
# Figures with other marks, such as M for memory and C for arithmetic, are not compared with results.
MARKS = {
    "A": "the authors' own figure, table or README",
    "S": "secondary notes, which agree with the authors' own wherever both have a figure",
}
# Dictionaries of one kind: special symbols and padding make a small difference.
SPECIAL_SYMBOLS, NEAR = 4, 0.05


@dataclass(frozen=True)
class PublishedFigure:
    """A published perplexity and its mark."""

    perplexity: float
    mark: str


def figures_of(runs: Sequence[Run]) -> dict[str, PublishedFigure]:
    """Return the published perplexity of each subset, from the first run of a model that names any.

    Raises `UserError` for an entry that is not a figure with its mark.
    """
    return {name: figure for name, figure in _named(runs).items() if "." not in name}


def curve_of(runs: Sequence[Run]) -> dict[int, PublishedFigure]:
    """Return the published validation perplexities of a model by update."""
    by_update = {name.partition(".")[2]: figure for name, figure in _named(runs).items() if name.startswith(BY_UPDATE)}
    return {int(update): figure for update, figure in by_update.items() if update.isdecimal() and len(update) < 19}


def _named(runs: Sequence[Run]) -> dict[str, PublishedFigure]:
    for run in runs:
        texts = {key: text for key, text in run.training.config.items() if key.startswith(PUBLISHED) and text}
        read = {key.removeprefix(PUBLISHED): _figure(run.folder, key, str(text)) for key, text in texts.items()}
        if found := {name: figure for name, figure in read.items() if figure is not None}:
            return found
    return {}


def _figure(folder: Path, key: str, text: str) -> "PublishedFigure | None":
    if not (found := FIGURE.fullmatch(text.strip())):
        raise UserError(f"{folder}: {key} is {text!r}; a published figure is written with its mark, such as '23.16 A'")
    return PublishedFigure(float(found[1]), found[2]) if found[2] in MARKS else None


def why_apart(run: Run) -> "str | None":
    """Return why a run does not compare with the published figures, in words, or None if it does.

    Perplexities compare on one text only, and per token only with one kind of dictionary.
    """
    config, model = run.training.config, run.training.model or {}
    corpus, own = config.get("experiment.corpus"), model.get("corpus")
    if not corpus or own != corpus:
        return f"whose data are of {own or 'an unnamed corpus'} and not of {corpus or 'a named one'}"
    vocabulary, types = config.get("experiment.vocabulary"), run.training.dictionary_types
    is_known = isinstance(vocabulary, int) and types is not None
    if is_known and abs(types - SPECIAL_SYMBOLS - vocabulary) <= NEAR * vocabulary:
        return None
    return f"whose dictionary has {_count(types)} symbols and not {_count(vocabulary)}"


def is_comparable(run: Run) -> bool:
    """Return whether a run compares with the published figures."""
    return why_apart(run) is None


def with_published(table: pd.DataFrame, models: dict[str, list[Run]]) -> pd.DataFrame:
    """Return the table of models with `published_SUBSET` and `published_SUBSET_mark`, if any model has one."""
    found = {model: figures_of(runs) for model, runs in models.items()}
    table = table.copy()
    for subset in dict.fromkeys(subset for figures in found.values() for subset in figures):
        figures = [found[model].get(subset) for model in table["model"]]
        table[f"published_{subset}"] = [figure.perplexity if figure else math.nan for figure in figures]
        table[f"published_{subset}_mark"] = [figure.mark if figure else None for figure in figures]
    return table


def legend(models: dict[str, list[Run]]) -> str:
    """Return what the marks mean and how far the figures compare, "" if no model has one."""
    named = {model: runs for model, runs in models.items() if figures_of(runs) or curve_of(runs)}
    if not named:
        return ""
    used = {
        one.mark for runs in named.values() for found in (figures_of(runs), curve_of(runs)) for one in found.values()
    }
    marks = "; ".join(f"{mark}: {text}" for mark, text in MARKS.items() if mark in used)
    words = f"Published perplexities were not measured by this project. Their marks: {marks}."
    apart = {why_apart(runs[0]) for runs in named.values()} - {None}
    for reason in sorted(apart):
        words += f" They do not compare with these runs, {reason}, and are left out of the figures."
    return words


def _count(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) else "an unknown number of"
