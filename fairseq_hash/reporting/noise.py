"""Which differences between models may be chance, judged by the spread over seeds."""

import itertools
import math
from collections.abc import Sequence

import pandas as pd


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
