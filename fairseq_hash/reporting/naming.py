"""Models among runs, and names and styles that tell them apart."""

import itertools
from collections.abc import Sequence
from typing import Any

from fairseq_hash.reporting.runs import Run

ROUTER_NAMES = {"none": "Dense", "hash": "Hash", "switch": "Switch", "topk": "Top-k", "base": "BASE"}
ROUTER_NAMES |= {"gshard": "GShard", "sinkhorn": "S-BASE", "expert-choice": "Expert Choice", "stablemoe": "StableMoE"}


def group_by_model(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each model (runs that differ only in their seed), under a name that tells models apart.

    The name is that of the experiment, or else the router's. If models share a name, the options that differ are added.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.model, []).append(run)
    members = list(groups.values())
    names = told_apart([_name(group) for group in members], [group[0].options for group in members])
    return dict(zip(names, members, strict=True))


def told_apart(names: Sequence[str], options: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names. Names that occur more than once get the options in which their models differ."""
    told = []
    for name, own in zip(names, options, strict=True):
        rivals = [others for other, others in zip(names, options, strict=True) if other == name]
        keys = sorted({*own}.union(*rivals))
        differing = [key for key in keys if any(rival.get(key) != own.get(key) for rival in rivals)]
        # fairseq repeats some options in other nodes: the optimizer and the schedule also have the learning rate.
        values = dict.fromkeys(f"{key.rpartition('.')[2]}={own.get(key)}" for key in differing)
        told.append(" ".join([name, *values]))
    return told


def router_name(run: Run) -> str:
    """Return the name of a run's router."""
    return ", ".join(ROUTER_NAMES.get(router, router) for router in run.training.model["router"].split(","))


def _name(runs: Sequence[Run]) -> str:
    given = (run.training.config.get("experiment.name") for run in runs)
    name = next((str(name) for name in given if name), router_name(runs[0]))
    record = runs[0].training.model
    # Records of older runs do not say it themselves.
    is_oracle = record.get("oracle") or ("hash" in record["router"] and record.get("hash_feature") == "future")
    return f"{name} (oracle: sees the next token)" if is_oracle else name


def is_dense(runs: Sequence[Run]) -> bool:
    """Return whether a model has no experts."""
    return runs[0].training.model["router"] == "none"


def styles_of(models: dict[str, list[Run]]) -> dict[str, tuple["int | None", int]]:
    """Return each model's colour in charts, None (neutral) for a dense one, and the number of its dashes or markers."""
    numbers = {True: itertools.count(), False: itertools.count()}
    styles = {}
    for model, runs in models.items():
        number = next(numbers[is_dense(runs)])
        styles[model] = None if is_dense(runs) else number, number
    return styles
