"""The tables of a study's report, as text for readers."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from fairseq_hash.reporting.comparison_table import NOTHING, count_text
from fairseq_hash.studies.breakdowns import (
    beside_baseline_by_frequency,
    frequency_labels,
    frequency_tokens,
    gain_from_context,
    nats_by_frequency,
    nats_by_position,
    position_labels,
)
from fairseq_hash.studies.leads import LeadCurve, lead, lead_over_documents
from fairseq_hash.studies.ngram_lines import NGRAMS, counted, lead_of
from fairseq_hash.studies.ngram_lines import beside_baseline_by_frequency as ngrams_by_frequency
from fairseq_hash.studies.records import TUNING
from fairseq_hash.studies.results import (
    ModelResult,
    Results,
    bits_per_byte,
    diverged_runs,
    exactly,
    mean_of,
    perplexity,
    validations_of,
)
from fairseq_hash.studies.statistics import BETTER, Interval, Verdict


def main_table(results: Results) -> pd.DataFrame:
    """Return one row per model, and beneath them one per n-gram model."""
    rows = [_of_model(result, results) for result in results.models.values()]
    valid = counted(results, "valid")
    for order, nats in counted(results, "test").items():
        of_valid = exactly(valid[order]) if order in valid else None
        rows.append({"Model": NGRAMS[order], **_losses(exactly(nats), of_valid, results)})
    return pd.DataFrame(rows).fillna(NOTHING)


def training_table(results: Results) -> pd.DataFrame:
    """Return perplexity on valid by the share of the training, and what the whole training took.

    A model whose runs were validated at different points is left out.
    """
    rows, tokens = [], set()
    for result in results.finished:
        validations = validations_of(result)
        if result.model.trained_as or validations is None:
            continue
        runs, nats = list(result.finals.values()), np.mean([[one.nats for one in run] for run in validations], axis=0)
        row = {at.tokens: f"{math.exp(mean):.2f}" for at, mean in zip(validations[0], nats, strict=True)}
        tokens |= row.keys()
        of_all = {"FLOPs": f"{runs[0].flops_per_token * runs[0].tokens:.3g}"}
        of_all["Minutes"] = f"{np.median([run.seconds for run in runs]) / 60:.1f}"
        rows.append({"Model": result.name, **row, **of_all})
    if not rows:
        return pd.DataFrame()
    for order, nats in counted(results, "valid").items():
        rows.append({"Model": NGRAMS[order], **dict.fromkeys(tokens, f"{math.exp(nats):.2f}")})
    table = pd.DataFrame(rows, columns=["Model", *sorted(tokens), "FLOPs", "Minutes"]).fillna(NOTHING)
    return table.rename(columns={at: f"at {at / max(tokens):.0%}" for at in tokens})


def _of_model(result: ModelResult, results: Results) -> dict[str, str]:
    runs, choice, sizes = list(result.finals.values()), result.choice, result.sizes
    row = {"Model": result.name, **_losses(mean_of(result.test_nats), mean_of(result.valid_nats), results)}
    if choice.rate is not None:
        row["Learning rate"] = f"{choice.rate:g}{' (edge)' if choice.is_at_edge else ''}"
    row["Seeds"] = str(len(runs)) + (f" ({len(result.diverged)} diverged)" if result.diverged else "")
    if sizes is not None:
        row |= {"Parameters": count_text(sizes.parameters), "Active": count_text(sizes.active)}
        row["FLOPs/token"] = count_text(sizes.flops_per_token)
    if runs:
        row["Tokens/s"] = f"{np.mean([run.tokens_per_second for run in runs]):,.0f}"
    loads, dropped = worst(result, "load_max"), worst(result, "dropped")
    row["Worst load"] = NOTHING if loads is None else f"{loads:.2f}"
    row["Dropped"] = NOTHING if dropped is None else f"{dropped:.1%}"
    return row


def worst(result: ModelResult, name: str) -> "float | None":
    """Return the largest `load_max` or `dropped` of a model's final runs, None for dense models."""
    return max((value for run in result.finals.values() if (value := getattr(run, name)) is not None), default=None)


def _losses(test: Interval, valid: "Interval | None", results: Results) -> dict[str, str]:
    return {
        "Test perplexity": with_ends(perplexity(test), 2),
        "Test bits per byte": with_ends(bits_per_byte(test, results.facts), 4),
        "Valid perplexity": NOTHING if valid is None else number(perplexity(valid).mean, 2),
    }


def number(value: float, digits: int) -> str:
    """Return a number, or a dash for NaN."""
    # Without the addition, -0.04 would be rounded to -0.0.
    return NOTHING if math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"


def with_ends(interval: Interval, digits: int, unit: str = "") -> str:
    """Return a mean with the ends of its interval, such as `4.1 % (3.9 to 4.3)`; a mean alone if there are no ends."""
    mean = number(interval.mean, digits) + ("" if math.isnan(interval.mean) else unit)
    ends = "" if math.isnan(interval.low) else f" ({number(interval.low, digits)} to {number(interval.high, digits)})"
    return mean + ends


def lead_table(results: Results, verdicts: dict[str, Verdict]) -> pd.DataFrame:
    """Return each model's lead over the baseline with both of its intervals, and its verdict."""
    rows = []
    for name, verdict in verdicts.items():
        over_documents = lead_over_documents(results, results.models[name])
        ends = NOTHING if over_documents is None else with_ends(over_documents, 1, " %")
        shown = {"Model": name, "Lead (95 % over seeds)": with_ends(lead(verdict.nats), 1, " %")}
        rows.append({**shown, "Lead (95 % over parts of test)": ends, "Verdict": short(verdict)})
    for order, nats in counted(results, "test").items():
        rows.append({"Model": NGRAMS[order], "Lead (95 % over seeds)": with_ends(lead_of(results, nats), 1, " %")})
    return pd.DataFrame(rows).fillna(NOTHING)


def pair_table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Return one row per pair of models."""
    rows = []
    for verdict in verdicts:
        p_values = [_p(value) for value in (verdict.p_difference, verdict.p_equivalence)]
        rows.append([verdict.one, verdict.other, with_ends(verdict.ratio, 3), *p_values, short(verdict)])
    headings = ["One", "Other", "Perplexity of other / one", "p of a difference", "p of equivalence", "Verdict"]
    return pd.DataFrame(rows, columns=headings)


def short(verdict: Verdict) -> str:
    """Return the word of a verdict, and which model is better."""
    return f"{verdict.better} better" if verdict.word == BETTER else verdict.word


def _p(value: float) -> str:
    return NOTHING if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def course_table(curves: dict[str, LeadCurve]) -> pd.DataFrame:
    """Return the lead of each model at each validation, by the share of the training."""
    rows = []
    for name, curve in curves.items():
        shares = [f"at {share:.0%}" for share in curve.tokens / curve.tokens[-1]]
        leads = [f"{number(value, 1)} %" for value in curve.lead_SN.mean(axis=0)]
        rows.append({"Model": name, **dict(zip(shares, leads, strict=True))})
    return pd.DataFrame(rows).fillna(NOTHING)


def position_table(results: Results) -> pd.DataFrame:
    """Return nats per token by position, and what is gained from context beyond a trigram's."""
    rows = []
    for result in results.finished:
        nats = nats_by_position(results, result)
        gain = gain_from_context(nats)
        rows.append([result.name, *(number(value, 3) for value in nats), NOTHING if gain is None else f"{gain:.3f}"])
    return pd.DataFrame(rows, columns=["Model", *position_labels(results.facts.tokens_per_sample), "Gain from context"])


def frequency_table(results: Results) -> pd.DataFrame:
    """Return nats per token by the token's count in the training text: the baseline's, and differences from them."""
    tokens = frequency_tokens(results.facts)
    rows = [["Share of test", *(f"{share:.1%}" for share in tokens / tokens.sum())]]
    if not results.baseline.finals:
        return pd.DataFrame()
    baseline = np.mean(list(nats_by_frequency(results, results.baseline).values()), axis=0)
    rows.append([f"{results.baseline.name}: nats", *(number(value, 3) for value in baseline)])
    differences = {result.name: beside_baseline_by_frequency(results, result) for result in results.finished}
    del differences[results.baseline.name]
    differences |= {NGRAMS[order]: values for order, values in ngrams_by_frequency(results).items()}
    for name, values in differences.items():
        if values is not None:
            rows.append([name, *(number(value, 3) for value in values)])
    return pd.DataFrame(rows, columns=["Model", *frequency_labels(results.facts)])


def tuning_table(results: Results) -> pd.DataFrame:
    """Return nats per token of valid by learning rate, for each model that has trainings of its own."""
    tried = {run.learning_rate for run in results.done if run.stage == TUNING}
    rows = []
    for model in results.study.trained():
        choice = results.models[model.name].choice
        row = {"Model": model.name}
        for rate in sorted(tried):
            if (nats := choice.nats.get(rate)) is not None:
                is_chosen = choice.is_settled and rate == choice.rate
                row[f"{rate:g}"] = ("diverged" if math.isinf(nats) else f"{nats:.3f}") + " (chosen)" * is_chosen
        rows.append(row)
    columns = ["Model", *(f"{rate:g}" for rate in sorted(tried))]
    return pd.DataFrame(rows, columns=columns).fillna(NOTHING) if tried else pd.DataFrame()


def diverged_table(results: Results) -> pd.DataFrame:
    """Return the runs that diverged, and why each broke off."""
    rows = [[run.model, run.stage, f"{run.learning_rate:g}", str(run.seed), why] for run, why in diverged_runs(results)]
    return pd.DataFrame(rows, columns=["Model", "Stage", "Learning rate", "Seed", "Why"])
