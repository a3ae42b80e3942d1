"""Which runs a study needs next: a function of its definition and of the records that are there.

Nothing else is remembered, so a study can be stopped and resumed anywhere.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fairseq_hash.studies.definition import FACTOR, Study
from fairseq_hash.studies.records import FINAL, TUNING, RunRecord


@dataclass(frozen=True, order=True)
class Run:
    """One training of a study: for tuning, or one of the final runs."""

    model: str
    learning_rate: float
    seed: int
    stage: str


Done = Mapping[Run, RunRecord]


@dataclass(frozen=True)
class Choice:
    """The learning rate of a model.

    Attributes:
        rate: the best one, None before all rates of the grid are tried, or if all of them diverged.
        nats: on valid by rate, infinity where the training diverged.
        is_settled: whether the rate is chosen: its neighbours are tried and worse, or the grid may not grow further.
        is_at_edge: whether a better rate may lie outside of those tried.
    """

    rate: "float | None"
    nats: Mapping[float, float]
    is_settled: bool
    is_at_edge: bool


def tuning_run(study: Study, model: str, rate: float) -> Run:
    """Return the run that tries a rate."""
    return Run(model, rate, study.tuning_seed, TUNING)


def choose(study: Study, model: str, done: Done) -> "tuple[Choice, list[Run]]":
    """Return the choice of a model's learning rate so far, and the runs that it needs next.

    With one rate there is nothing to tune.
    """
    grid = list(study.learning_rates)
    if len(grid) == 1:
        return Choice(grid[0], {}, True, False), []
    lowest, highest = grid[0], grid[-1]
    while True:
        runs = [tuning_run(study, model, rate) for rate in grid]
        nats = {run.learning_rate: done[run].valid_nats for run in runs if run in done}
        if waiting := [run for run in runs if run not in done]:
            return Choice(None, nats, False, False), waiting
        best = min(nats, key=nats.__getitem__)
        below = best == grid[0] and best > lowest * FACTOR ** (-study.grow) * 1.001
        above = best == grid[-1] and best < highest * FACTOR**study.grow / 1.001
        if not math.isfinite(nats[best]):
            below, above = grid[0] > lowest * FACTOR ** (-study.grow) * 1.001, False
        if below:
            grid.insert(0, _rounded(grid[0] / FACTOR))
        elif above:
            grid.append(_rounded(grid[-1] * FACTOR))
        else:
            is_known = math.isfinite(nats[best])  # or every rate diverged, and there is none to train with
            return Choice(best if is_known else None, nats, True, best in (grid[0], grid[-1])), []


def wanted(study: Study, done: Done) -> list[Run]:
    """Return the runs that can be made now, in the order in which they are best made.

    A study that is stopped early has its first models complete: models come in their order, each with its tuning and
    then its seeds. A model whose table is made of another model's run waits for that run.
    """
    runs: list[Run] = []
    for model in study.trained():
        if model.table_of and choose(study, model.table_of, done)[0].rate is None:
            continue
        choice, tuning = choose(study, model.name, done)
        runs += tuning
        if choice.is_settled and choice.rate is not None:
            finals = [Run(model.name, choice.rate, seed, FINAL) for seed in study.seeds]
            runs += [run for run in finals if run not in done]
    return runs


def done_of(study: Study, records: Iterable[RunRecord]) -> Done:
    """Return a study's own records by run."""
    done = {}
    for record in records:
        stage = TUNING if record.seed == study.tuning_seed and len(study.learning_rates) > 1 else FINAL
        done[Run(record.model, record.learning_rate, record.seed, stage)] = record
    return done


def expected_runs(study: Study) -> int:
    """Return how many runs the study has if no grid grows."""
    return len(study.trained()) * (tuning_runs(study) + len(study.seeds))


def tuning_runs(study: Study) -> int:
    """Return how many runs tune one model's rate if its grid does not grow."""
    return len(study.learning_rates) if len(study.learning_rates) > 1 else 0


def _rounded(rate: float) -> float:
    return float(f"{rate:.6g}")
