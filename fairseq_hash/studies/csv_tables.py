"""The results of a study as CSV files, with all digits."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fairseq_hash.studies.leads import comparison_verdicts, lead, lead_verdicts, pair_verdicts
from fairseq_hash.studies.ngram_lines import NGRAMS, counted, lead_of
from fairseq_hash.studies.records import TUNING, RunRecord
from fairseq_hash.studies.results import ModelResult, Results, bits_per_byte, exactly, mean_of, perplexity
from fairseq_hash.studies.statistics import Interval, Verdict
from fairseq_hash.studies.tables import worst


def results_csv(results: Results, verdicts: Mapping[str, Verdict]) -> bytes:
    """Return one row per model, and beneath one per n-gram model. What there is none of is empty."""
    rows = [_of_model(result, results, verdicts.get(result.name)) for result in results.models.values()]
    valid = counted(results, "valid")
    for order, nats in counted(results, "test").items():
        row: dict[str, Any] = {"model": NGRAMS[order]}
        row |= {"test_nats": nats, "test_perplexity": math.exp(nats)}
        row["valid_perplexity"] = math.exp(valid[order]) if order in valid else None
        row["test_bits_per_byte"] = bits_per_byte(exactly(nats), results.facts).mean
        rows.append(row | (_ends("lead_percent", lead_of(results, nats)) if results.baseline.finals else {}))
    return _csv(rows, whole=("seeds", "diverged", "missing", "parameters", "active", "experts", "tokens"))


def _of_model(result: ModelResult, results: Results, verdict: "Verdict | None") -> dict[str, Any]:
    choice, sizes, runs = result.choice, result.sizes, list(result.finals.values())
    test, valid = mean_of(result.test_nats), mean_of(result.valid_nats)
    row: dict[str, Any] = {"model": result.name, "trained_as": result.model.trained_as}
    row |= {"seeds": len(runs), "diverged": len(result.diverged), "missing": len(result.missing)}
    row |= {"learning_rate": choice.rate, "at_edge": choice.is_at_edge if choice.is_settled else None}
    row |= _ends("test_nats", test) | _ends("test_perplexity", perplexity(test))
    row |= _ends("test_bits_per_byte", bits_per_byte(test, results.facts))
    row |= _ends("valid_perplexity", perplexity(valid))
    row |= _ends("lead_percent", lead(verdict.nats) if verdict else Interval(math.nan, math.nan, math.nan, 0))
    row |= {"verdict": verdict.word if verdict else None, "better": verdict.better if verdict else None}
    for name in ("parameters", "active", "experts", "flops_per_token", "tokens"):
        row[name] = getattr(sizes, name) if sizes else None
    for name in ("seconds", "tokens_per_second"):
        row[name] = float(np.mean([getattr(run, name) for run in runs])) if runs else None
    return row | {"load_max": worst(result, "load_max"), "dropped": worst(result, "dropped")}


def _ends(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def runs_csv(results: Results) -> bytes:
    """Return one row per run, tuning included. `test_nats` are those of the evaluation of each name."""
    models = results.study.models
    rows = []
    for run, record in sorted(results.done.items(), key=lambda item: item[0]):
        row: dict[str, Any] = {"model": run.model, "stage": run.stage, "learning_rate": run.learning_rate}
        row |= {"seed": run.seed, "diverged": record.diverged, "valid_nats": _finite(record)}
        row |= dict.fromkeys(f"test_nats: {name}" for name in models)
        for name, model in models.items():
            if run.model in (name, model.trained_as) and model.evaluation in record.test:
                row[f"test_nats: {name}"] = record.test[model.evaluation].nats
        for name in ("tokens", "seconds", "tokens_per_second", "load_max", "dropped", "identity"):
            row[name] = getattr(record, name)
        row |= {name: record.provenance.get(name) for name in ("fairseq_hash", "commit", "processor", "date")}
        rows.append(row)
    return _csv(rows)


def tuning_csv(results: Results) -> bytes:
    """Return one row per learning rate that was tried for a model."""
    rows = []
    for run, record in sorted(results.done.items(), key=lambda item: item[0]):
        if run.stage == TUNING:
            choice = results.models[run.model].choice
            row = {"model": run.model, "learning_rate": run.learning_rate, "valid_nats": _finite(record)}
            row["chosen"] = choice.is_settled and run.learning_rate == choice.rate
            rows.append(row | {"diverged": record.diverged})
    return _csv(rows, columns=["model", "learning_rate", "valid_nats", "chosen", "diverged"])


def curves_csv(results: Results) -> bytes:
    """Return one row per validation of a final run, and one per n-gram model, which has the same nats always."""
    columns = ["model", "seed", "tokens", "seconds", "flops", "valid_nats"]
    rows: list[dict[str, Any]] = []
    for result in results.finished:
        for seed, run in result.finals.items() if not result.model.trained_as else ():
            for at in run.validations:
                values = (result.name, seed, at.tokens, at.seconds, run.flops_per_token * at.tokens, at.nats)
                rows.append(dict(zip(columns, values, strict=True)))
    rows += [{"model": NGRAMS[order], "valid_nats": nats} for order, nats in counted(results, "valid").items()]
    return _csv(rows, columns, whole=("seed", "tokens"))


def pairs_csv(results: Results) -> bytes:
    """Return one row per pair that is judged, with the pairs that its p-values are adjusted for: `adjusted_with`."""
    families = {
        "baseline": list(lead_verdicts(results).values()),
        "comparisons": comparison_verdicts(results),
        "all": pair_verdicts(results),
    }
    rows = []
    for family, verdicts in families.items():
        for verdict in verdicts:
            row: dict[str, Any] = {"adjusted_with": family, "one": verdict.one, "other": verdict.other}
            row |= _ends("nats_other_minus_one", verdict.nats) | {"seeds": verdict.nats.count}
            row |= {"p_difference": verdict.p_difference, "p_equivalence": verdict.p_equivalence}
            rows.append(row | {"verdict": verdict.word, "better": verdict.better})
    ends = [f"nats_other_minus_one{end}" for end in ("", "_low", "_high")]
    columns = ["adjusted_with", "one", "other", *ends, "seeds", "p_difference", "p_equivalence", "verdict", "better"]
    return _csv(rows, columns)


def _finite(record: RunRecord) -> "float | None":
    return record.valid_nats if math.isfinite(record.valid_nats) else None


def _csv(rows: list[dict[str, Any]], columns: "list[str] | None" = None, whole: Sequence[str] = ()) -> bytes:
    """Return rows as CSV. `whole` are columns of whole numbers, which would become 5.0 where a row has none."""
    table = pd.DataFrame(rows, columns=columns)
    return table.astype(dict.fromkeys(whole, "Int64")).to_csv(index=False).encode()
