"""The results of a study: for each of its models the final runs, its learning rate, and what is missing or diverged."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fairseq_hash.studies.definition import Study, StudyModel
from fairseq_hash.studies.records import FINAL, RunRecord, Scores, TextFacts, Validation
from fairseq_hash.studies.schedule import Choice, Run, choose
from fairseq_hash.studies.statistics import Interval, t_interval


@dataclass(frozen=True)
class ModelResult:
    """What there is of one model.

    Attributes:
        model: of the study.
        choice: of its learning rate; that of `trained_as` if it shares the trainings of another model.
        finals: its final runs by seed, those with scores on test.
        diverged: the final runs that broke off, by seed.
        missing: the seeds that have neither.
        sizes: any run of the model, tuning included, for what all of its runs share; None before the first one.
    """

    model: StudyModel
    choice: Choice
    finals: Mapping[int, RunRecord]
    diverged: Mapping[int, RunRecord]
    missing: tuple[int, ...]
    sizes: "RunRecord | None"

    @property
    def name(self) -> str:
        """The model's name in the study."""
        return self.model.name

    @property
    def scores(self) -> dict[int, Scores]:
        """The scores on test by seed."""
        return {seed: record.test[self.model.evaluation] for seed, record in self.finals.items()}

    @property
    def test_nats(self) -> dict[int, float]:
        """Mean nats per token of test by seed."""
        return {seed: scores.nats for seed, scores in self.scores.items()}

    @property
    def valid_nats(self) -> dict[int, float]:
        """Mean nats per token of valid at the end of the training, by seed."""
        return {seed: record.valid_nats for seed, record in self.finals.items()}


@dataclass(frozen=True)
class Results:
    """A study with its text, all runs that are done, and its models' results by name, in the study's order."""

    study: Study
    facts: TextFacts
    done: Mapping[Run, RunRecord]
    models: Mapping[str, ModelResult]

    @property
    def baseline(self) -> ModelResult:
        """The model to which the others' lead is drawn."""
        return self.models[self.study.baseline]

    @property
    def dense(self) -> "ModelResult | None":
        """The first dense model of the study that has final runs, None without one."""
        found = (result for result in self.finished if result.sizes is not None and result.sizes.experts == 0)
        return next(found, None)

    @property
    def finished(self) -> list[ModelResult]:
        """The models with at least one final run."""
        return [result for result in self.models.values() if result.finals]


def gather(study: Study, facts: TextFacts, done: Mapping[Run, RunRecord]) -> Results:
    """Sort the runs that are done to the study's models."""
    return Results(study, facts, done, {name: _of_model(study, name, done) for name in study.models})


def _of_model(study: Study, name: str, done: Mapping[Run, RunRecord]) -> ModelResult:
    model = study.models[name]
    trained = model.trained_as or name
    choice, _ = choose(study, trained, done)
    finals, diverged, missing = {}, {}, []
    for seed in study.seeds:
        # Before a rate is chosen there are no final runs.
        record = done.get(Run(trained, choice.rate, seed, FINAL)) if choice.rate is not None else None
        if record is not None and record.diverged:
            diverged[seed] = record
        elif record is not None and model.evaluation in record.test:
            finals[seed] = record
        else:
            missing.append(seed)
    sizes = next((record for run, record in sorted(done.items(), key=_by_run) if run.model == trained), None)
    return ModelResult(model, choice, finals, diverged, tuple(missing), sizes)


def _by_run(item: tuple[Run, RunRecord]) -> Run:
    return item[0]


def validations_of(result: ModelResult) -> "list[list[Validation]] | None":
    """Return the validations of each final run; None without runs, or if they were made at different points."""
    found = [run.validations for run in result.finals.values()]
    points = {tuple(one.tokens for one in of_run) for of_run in found}
    return found if len(points) == 1 else None


def mean_of(by_seed: Mapping[int, float]) -> Interval:
    """Return the mean over the seeds with its 95 % interval; all NaN without seeds."""
    return t_interval(list(by_seed.values())) if by_seed else Interval(math.nan, math.nan, math.nan, 0)


def perplexity(nats: Interval) -> Interval:
    """Return e to the power of a mean of nats, and of its ends."""
    return Interval(*np.exp([nats.mean, nats.low, nats.high]).tolist(), nats.count)


def bits_per_byte(nats: Interval, facts: TextFacts) -> Interval:
    """Return nats per token of test as bits per byte of its text."""
    factor = facts.tokens["test"] / math.log(2) / facts.bytes["test"]
    return Interval(factor * nats.mean, factor * nats.low, factor * nats.high, nats.count)


def exactly(value: float) -> Interval:
    """Return a value that has no spread, such as that of an n-gram model."""
    return Interval(value, math.nan, math.nan, 1)


def missing_runs(results: Results) -> list[tuple[str, str]]:
    """Return the models that are not complete, and what each lacks, in words."""
    rows = []
    for result in results.models.values():
        if not result.missing:
            continue
        if result.choice.is_settled and result.choice.rate is None:
            lack = f"a learning rate: its trainings diverged with all {len(result.choice.nats)} that were tried"
        elif not result.choice.is_settled:
            lack = f"its learning rate is not chosen yet ({len(result.choice.nats)} tried), so no final run"
        elif result.model.trained_as and not result.finals:
            lack = f"evaluation of {result.model.trained_as}'s final runs, or these runs"
        else:
            lack = f"final runs with seed {', '.join(map(str, result.missing))}"
        rows.append((result.name, lack))
    return rows


def diverged_runs(results: Results) -> list[tuple[Run, str]]:
    """Return the runs that diverged, and why each broke off."""
    return [(run, record.diverged) for run, record in sorted(results.done.items(), key=_by_run) if record.diverged]


def means_of(results: Results) -> dict[str, float]:
    """Return the mean nats per token of test of each model that has final runs."""
    return {result.name: mean_of(result.test_nats).mean for result in results.finished}


def oracles(results: Results) -> str:
    """Return in words which models are scored with routes that depend on the tokens to be predicted."""
    balanced = (
        name for name, model in results.study.models.items() if model.options.get("base_evaluation") == "balanced"
    )
    names = [name for name in balanced if results.models[name].finals]
    if not names:
        return ""
    are, they = ("is", "it is no language model") if len(names) == 1 else ("are", "they are no language models")
    return (
        f"{', '.join(names)} {are} scored with balanced assignment: a token's expert depends on all tokens of its "
        f"batch, those to be predicted too. So {they}, and the perplexity is that of an oracle."
    )


def one_under_two_names(results: Results) -> str:
    """Return in words which models have the very same nats per token of test with each of two or more seeds.

    Two trainings that differ in anything differ in some digit: such models differ in name alone.
    """
    groups: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for result in results.finished:
        if len(result.test_nats) > 1:
            groups.setdefault(tuple(sorted(result.test_nats.items())), []).append(result.name)
    return " ".join(
        f"{', '.join(names[:-1])} and {names[-1]} have the very same loss with each seed: they are one model under "
        f"{len(names)} names."
        for names in groups.values()
        if len(names) > 1
    )
