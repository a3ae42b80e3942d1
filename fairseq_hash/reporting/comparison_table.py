"""Results of runs as tables: one row per run, and one row per model with mean and spread over its seeds."""

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from fairseq_hash.moe.routing_stats import OF_ALL_LAYERS, OF_MONITOR
from fairseq_hash.reporting.runs import Run

# Start-up, first allocations and empty caches are not the model's speed or balance.
SETTLING_SHARE = 0.1
PERPLEXITY = "_perplexity"
NOTHING = "–"
# Statistics that the criterion logs for each sparse layer. The other statistics of a layer belong to its router.
OF_EVERY_LAYER = {*OF_ALL_LAYERS, *OF_MONITOR}
# Entries of a record about the libraries and the machine, by their heading.
MACHINE = {
    **{"fairseq_hash": "fairseq_hash", "commit": "Commit", "python": "Python", "torch": "torch", "fairseq": "fairseq"},
    **{"processor": "Processor", "cores": "Usable cores", "gpus": "GPUs", "platform": "Platform"},
}


def settled_intervals(run: Run) -> list[dict[str, Any]]:
    """Return the statistics of the training's log intervals in order, without the first tenth."""
    intervals = [values for _, values in sorted(run.training.intervals.items())]
    return intervals[min(len(intervals) - 1, max(1, round(SETTLING_SHARE * len(intervals)))) :]


def last_validation(run: Run) -> dict[str, Any]:
    """Return the statistics of the last validation, {} if the training had none."""
    return run.training.validations[max(run.training.validations)] if run.training.validations else {}


def best_validation(run: Run) -> "float | None":
    """Return the lowest perplexity of a validation in training, None if no validation covered the whole text."""
    perplexities = [values["ppl"] for values in run.training.validations.values() if "ppl" in values]
    return (
        min((value for value in perplexities if math.isfinite(value)), default=None) if not why_partial(run) else None
    )


def why_partial(run: Run) -> "str | None":
    """Return why the validations in training covered only a part of the text, None if they covered all of it."""
    if steps := run.training.config.get("dataset.max_valid_steps"):
        return f"it was of {steps} batches of the text (--max-valid-steps)"
    return "it left out samples that were too long" if "valid" in run.training.left_out_of else None


def sparse_layers(run: Run) -> list[int]:
    """Return the sparse layers in the training's log."""
    keys = {key for values in run.training.intervals.values() for key in values}
    return sorted(int(found[1]) for key in keys if (found := re.fullmatch(r"layer(\d{1,9})_load_max", key)))


def router_statistics(run: Run, layer: int) -> list[str]:
    """Return the names of the statistics that a layer's router logs, besides loads and dropped tokens."""
    prefix = f"layer{layer}_"
    keys = dict.fromkeys(key for values in run.training.intervals.values() for key in values if key.startswith(prefix))
    return [name for name in (key.removeprefix(prefix) for key in keys) if name not in OF_EVERY_LAYER]


def measure(model: str, run: Run) -> dict[str, Any]:
    """Return one row: the results in a run's logs. Perplexities are per token of the dictionary, times in seconds.

    `valid_from` is the source of `valid_perplexity`: "evaluation", or "training" for the best validation. `peak_gb` is
    the largest of the log, NaN for logs without it. `load_max` is the largest demand for an expert divided by the mean
    demand: the mean over the training's log intervals, and the value of the last validation. `dropped` is the mean
    share of the training's tokens that found their expert full. Columns without a layer number are those of the worst
    layer.
    """
    record, intervals, validation = run.training.model, settled_intervals(run), last_validation(run)
    peaks = [values["peak_gb"] for values in run.training.intervals.values() if "peak_gb" in values]
    row: dict[str, Any] = {"model": model, "router": record["router"], "seed": run.seed, "folder": str(run.folder)}
    row |= {f"{subset}_perplexity": run.evaluations[subset].perplexity for subset in ordered(run.evaluations)}
    if "valid" in run.evaluations:
        row["valid_from"] = "evaluation"
    elif (best := best_validation(run)) is not None:
        row |= {"valid_perplexity": best, "valid_from": "training"}
    row |= {
        "parameters_total": record["parameters_total"],
        "parameters_active": record["parameters_active"],
        "experts": record["num_experts"],
        "updates": run.training.updates,
        "updates_per_second": statistics.median(values["ups"] for values in intervals),
        "tokens_per_second": statistics.median(values["wps"] for values in intervals),
        "wall_seconds": run.training.wall_seconds,
        "peak_gb": max(peaks, default=math.nan),
    }
    layers = sparse_layers(run)
    of_layer: dict[str, Any] = {}
    for layer in layers:
        of_layer[f"layer{layer}_load_max_train"] = _mean(intervals, f"layer{layer}_load_max")
        of_layer[f"layer{layer}_load_max_valid"] = validation.get(f"layer{layer}_load_max", math.nan)
        of_layer[f"layer{layer}_load_cv_train"] = _mean(intervals, f"layer{layer}_load_cv")
        of_layer[f"layer{layer}_dropped"] = _mean(intervals, f"layer{layer}_dropped")
        for name in router_statistics(run, layer):
            of_layer[f"layer{layer}_{name}_train"] = _mean(intervals, f"layer{layer}_{name}")
    for name in ("load_max_train", "load_max_valid", "dropped"):
        values = [of_layer[f"layer{layer}_{name}"] for layer in layers]
        row[name] = max((value for value in values if not math.isnan(value)), default=math.nan)
    return row | of_layer


def ordered(subsets: Iterable[str]) -> list[str]:
    """Return subsets by name, `valid` before `test` and these before any other."""
    return sorted(subsets, key=lambda subset: (subset != "valid", subset != "test", subset))


def _mean(intervals: Sequence[dict[str, Any]], key: str) -> float:
    """Return the mean of a value over the intervals that have it; NaN where none has, as in a damaged log."""
    found = [values[key] for values in intervals if key in values]
    return statistics.fmean(found) if found else math.nan


def table_of_runs(models: dict[str, list[Run]]) -> pd.DataFrame:
    """Return one row per run, in the order of the models."""
    rows = pd.DataFrame([measure(model, run) for model, runs in models.items() for run in runs])
    known = ordered(name.removesuffix(PERPLEXITY) for name in rows if name.endswith(PERPLEXITY))
    others = [name for name in rows if not name.endswith(PERPLEXITY)]
    place = others.index("folder") + 1
    return rows[[*others[:place], *(f"{subset}{PERPLEXITY}" for subset in known), *others[place:]]]


def table_of_models(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per model: the number of its runs, means, and for perplexities the sample standard deviation.

    The deviation (`..._sd`) is NaN for a single run. The memory is the largest value, not the mean.
    """
    groups = runs.groupby("model", sort=False)
    table = groups.mean(numeric_only=True).drop(columns="seed")
    table.insert(0, "runs", groups.size())
    for column in [column for column in table if column.endswith("_perplexity")]:
        table.insert(table.columns.get_loc(column) + 1, f"{column}_sd", groups[column].std(ddof=1))
    if "valid_from" in runs:
        table.insert(table.columns.get_loc("valid_perplexity_sd") + 1, "valid_from", groups["valid_from"].first())
    if "peak_gb" in table:
        table["peak_gb"] = groups["peak_gb"].max()
    return table.reset_index()


def for_readers(models: pd.DataFrame) -> pd.DataFrame:
    """Return the table of models as text with headings and units, for people."""

    def column(name: str, form: str) -> list[str]:
        values = models.get(name, [math.nan] * len(models))  # no run's log may have it
        return [NOTHING if pd.isna(value) else form.format(value) for value in values]

    shown: dict[str, list[str]] = {"Model": list(models["model"])}
    for name in [name for name in models if name.endswith("_perplexity")]:
        spread = ["" if pd.isna(value) else f" ± {value:.2f}" for value in models[f"{name}_sd"]]
        heading = f"{name.removesuffix('_perplexity').capitalize()} perplexity"
        shown[heading] = [value + sd for value, sd in zip(column(name, "{:.2f}"), spread, strict=True)]
        if name == "valid_perplexity" and "valid_from" in models:
            origins = [" (training)" if origin == "training" else "" for origin in models["valid_from"]]
            shown[heading] = [value + origin for value, origin in zip(shown[heading], origins, strict=True)]
    for name in [name for name in models if f"{name}_mark" in models]:
        marks = ["" if pd.isna(mark) else f" ({mark})" for mark in models[f"{name}_mark"]]
        values = [text + mark for text, mark in zip(column(name, "{:.2f}"), marks, strict=True)]
        shown[name.replace("_", " ").capitalize()] = values
    shown["Seeds"] = column("runs", "{:d}")
    shown["Parameters"] = [count_text(value) for value in models["parameters_total"]]
    shown["Active"] = [count_text(value) for value in models["parameters_active"]]
    shown["Updates"] = column("updates", "{:,.0f}")
    shown["Updates/s"] = column("updates_per_second", "{:,.3g}")
    shown["Tokens/s"] = column("tokens_per_second", "{:,.0f}")
    shown["Time"] = [duration_text(value) for value in models["wall_seconds"]]
    shown["Peak memory"] = column("peak_gb", "{:.2f} GB")
    if models["load_max_train"].notna().any():
        shown["Max load, training"] = column("load_max_train", "{:.2f}")
        shown["Max load, validation"] = column("load_max_valid", "{:.2f}")
        shown["Dropped"] = [NOTHING if pd.isna(value) else f"{value:.1%}" for value in models["dropped"]]
    return pd.DataFrame(shown)


def layers_for_readers(models: pd.DataFrame) -> pd.DataFrame:
    """Return one row per model and sparse layer, as text. Empty if all models are dense.

    Loads, dropped tokens and the routers' own statistics: means over the training's log intervals.
    """
    rows = []
    layers = [int(found[1]) for name in models if (found := re.fullmatch(r"layer(\d{1,9})_dropped", name))]
    found = (re.fullmatch(r"layer\d+_(\w+)_train", name) for name in models)
    own = dict.fromkeys(name[1] for name in found if name and name[1] not in OF_EVERY_LAYER)
    for model in models.to_dict("records"):
        for layer in sorted(layers):
            values = [model[f"layer{layer}_{name}"] for name in ("load_max_train", "load_max_valid", "load_cv_train")]
            if not pd.isna(values[0]):
                loads = [NOTHING if pd.isna(value) else f"{value:.2f}" for value in values]
                means = [model.get(f"layer{layer}_{name}_train", math.nan) for name in own]
                texts = [NOTHING if pd.isna(value) else f"{value:.3g}" for value in means]
                rows.append([model["model"], str(layer), *loads, f"{model[f'layer{layer}_dropped']:.1%}", *texts])
    headings = ["Model", "Layer", "Max load, training", "Max load, validation"]
    headings += ["Load variation, training", "Dropped", *(name.replace("_", " ").capitalize() for name in own)]
    return pd.DataFrame(rows, columns=headings)


def markdown(table: pd.DataFrame, words: bool = False) -> str:
    """Return a table of text in Markdown. All columns except the first are right-aligned unless they hold `words`."""
    rows = [
        list(table.columns),
        ["---", *["---" if words else "---:"] * (len(table.columns) - 1)],
        *table.to_numpy().tolist(),
    ]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def count_text(count: float) -> str:
    """Return a number of parameters in millions or billions."""
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def duration_text(seconds: float) -> str:
    """Return a time such as 98 s, 12.5 min or 3.2 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
