"""The models' leads over the baseline: verdicts on test, paired by seed, and how a lead changes during training.

A lead is the share by which a model's perplexity is lower than that of the baseline, in percent. A negative lead is a
deficit.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fairseq_hash.studies.results import ModelResult, Results, validations_of
from fairseq_hash.studies.statistics import Interval, Verdict, bootstrap_documents, compare_pairs, t_interval


@dataclass(frozen=True)
class LeadCurve:
    """A model's lead over another one on valid, over the course of the training.

    Attributes:
        tokens: of the training at each validation, [N].
        lead_SN: in percent, by seed that both models share, [S, N].
        half: the validation that is nearest to half of the training.
    """

    tokens: np.ndarray
    lead_SN: np.ndarray
    half: int

    @property
    def change(self) -> Interval:
        """The lead at the end minus that at half of the training, in percentage points, paired by seed."""
        return t_interval(self.lead_SN[:, -1] - self.lead_SN[:, self.half])


def lead(nats: Interval) -> Interval:
    """Return the lead in percent, given nats of a model minus nats of the baseline."""
    return Interval(_percent(nats.mean), _percent(nats.high), _percent(nats.low), nats.count)


def _percent(nats: float) -> float:
    return -100 * math.expm1(nats)


def lead_verdicts(results: Results) -> dict[str, Verdict]:
    """Return each judged model's verdict against the baseline, {} if the baseline cannot be judged."""
    nats, baseline = _nats(results), results.baseline.name
    others = [name for name in nats if name != baseline]
    pairs = [(baseline, name) for name in others if baseline in nats]
    verdicts = compare_pairs(nats, pairs, results.study.margin, len(results.models) - 1)
    return {verdict.other: verdict for verdict in verdicts}


def comparison_verdicts(results: Results) -> list[Verdict]:
    """Return the verdicts of the study's own comparisons, as far as their models can be judged."""
    nats, comparisons = _nats(results), results.study.comparisons
    pairs = [pair for pair in comparisons if set(pair) <= nats.keys()]
    return compare_pairs(nats, pairs, results.study.margin, len(comparisons))


def pair_verdicts(results: Results) -> list[Verdict]:
    """Return the verdicts of all pairs of models that can be judged."""
    nats = _nats(results)
    pairs = list(itertools.combinations(nats, 2))
    return compare_pairs(nats, pairs, results.study.margin, math.comb(len(results.models), 2))


def lead_over_documents(results: Results, result: ModelResult) -> "Interval | None":
    """Return the lead with its interval over the parts of test; None if there are too few parts."""
    tokens = np.array(results.facts.document_tokens)
    if len(tokens) < 2:
        return None
    one, other = (np.array([one.document_nats for one in of.scores.values()]) for of in (results.baseline, result))
    return lead(bootstrap_documents(one, other, tokens))


def _nats(results: Results) -> Mapping[str, Mapping[int, float]]:
    """Return the losses by seed of the models that can be judged.

    A model of which a final run diverged is not judged: the seeds that are left may be its best ones.
    """
    return {result.name: result.test_nats for result in results.finished if not result.diverged}


def lead_curves(results: Results, over: ModelResult) -> dict[str, LeadCurve]:
    """Return the curves of the models that have trainings and a seed in common with `over`, mostly the baseline."""
    curves = {}
    trained_as = over.model.trained_as or over.name
    for result in results.finished:
        if result.model.trained_as or result.name == trained_as:
            continue
        if (curve := _curve(result, over)) is not None:
            curves[result.name] = curve
    return curves


def _curve(result: ModelResult, over: ModelResult) -> "LeadCurve | None":
    seeds = [seed for seed in result.finals if seed in over.finals]
    own, other = ([of.finals[seed].validations for seed in seeds] for of in (result, over))
    # Only validations after the same share of the training can be paired.
    if not seeds or len({tuple(one.tokens for one in validations) for validations in own + other}) != 1:
        return None
    nats_SN, other_SN = (np.array([[one.nats for one in seed] for seed in of]) for of in (own, other))
    tokens = np.array([one.tokens for one in own[0]], dtype=float)
    return LeadCurve(tokens, -100 * np.expm1(nats_SN - other_SN), _half(tokens))


def curve_over(over: ModelResult, nats: float) -> "LeadCurve | None":
    """Return the lead over a model of what has the same nats on valid always, such as an n-gram model.

    None without final runs, or if they were validated at different points.
    """
    validations = validations_of(over)
    if validations is None:
        return None
    own_SN = np.array([[one.nats for one in run] for run in validations])
    tokens = np.array([one.tokens for one in validations[0]], dtype=float)
    return LeadCurve(tokens, -100 * np.expm1(nats - own_SN), _half(tokens))


def _half(tokens: np.ndarray) -> int:
    return int(np.abs(tokens - tokens[-1] / 2).argmin())


def course(name: str, curve: LeadCurve) -> str:
    """Return in words the lead at half of the training and at its end, and whether it changed."""
    middle, end = (round(float(value), 1) + 0.0 for value in curve.lead_SN[:, [curve.half, -1]].mean(axis=0))
    if curve.half == len(curve.tokens) - 1:
        return f"{name} ends with a lead of {end:.1f} %. No validation lies near half of the training."
    low, high = (round(float(end), 1) + 0.0 for end in (curve.change.low, curve.change.high))
    start = f"{name} has a lead of {middle:.1f} % at half of the training and of {end:.1f} % at its end"
    change = curve.change
    if change.low <= 0 <= change.high:
        return f"{start}. No clear change: {low:.1f} to {high:.1f} points (95 % interval over seeds)."
    falls = change.mean < 0
    word = ("shrank" if falls else "grew") if middle > 0 else ("fell" if falls else "rose")
    if change.count == 1:
        return f"{start}. It {word} by {abs(change.mean):.1f} points (one seed, so chance is not ruled out)."
    low, high = sorted([abs(change.low), abs(change.high)])
    return f"{start}. It {word} by {abs(change.mean):.1f} points (95 % interval over seeds {low:.1f} to {high:.1f})."
