"""What a log must say for a report, and of which kind: asked when it is read, as a damaged log may say anything."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.fields import fits

COUNT = int | None
# Options that reports look at. Other options are compared as they are.
OPTIONS = {
    "common.seed": int,
    "optimization.max_update": int | float,
    "optimization.max_epoch": int | float,
    "optimization.update_freq": list[int],
    "criterion.update_freq_ranks": COUNT,
    "distributed_training.distributed_world_size": COUNT,
    "dataset.num_shards": COUNT,
    "dataset.gen_subset": str,
    "common_eval.path": str | None,
    "task.tokens_per_sample": COUNT,
    "task.sample_break_mode": str | None,
    "eval_lm.context_window": COUNT,
}
OF_TRAINING = ("common.seed", "optimization.max_update", "optimization.max_epoch")
OF_EVALUATION = ("common_eval.path", "dataset.gen_subset")
# The model's record. What is not in `OF_RECORD` may be missing, as in older logs.
RECORD = {
    "router": str,
    "num_experts": int,
    "parameters_total": int,
    "parameters_active": int,
    "dictionary_fingerprint": str,
    "table_fingerprint": str | None,
    "date": str,
    "gpus": list[str],
    "processor": str | None,
    "corpus": str | None,
    "hash_feature": str | None,
}
OF_RECORD = ("router", "num_experts", "parameters_total", "parameters_active", "dictionary_fingerprint", "date")
NUMBERS = re.compile(r"ups|wps|wall|ppl|peak_gb|num_updates|layer\d+_.+")
OF_INTERVAL, OF_VALIDATION = ("ups", "wps", "wall", "ppl"), ("ppl",)
REMEDY = "give the log as fairseq wrote it"


def check_entries(what: str, given: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Raise `UserError` for the first entry that is not of its kind."""
    for name, kind in kinds.items():
        if name in given and not fits(given[name], kind):
            raise UserError(f"{what} says that {name} is {given[name]!r}; {REMEDY}")


def check_statistics(source: str, values: Mapping[str, Any]) -> None:
    """Raise `UserError` unless statistics are numbers where a report needs some; `source` is the logger of the line."""
    for name in filter(NUMBERS.fullmatch, values):
        # Not `fits`: a loss may be no number.
        one = values[name]
        parts = one if isinstance(one, list) and one and name.startswith("layer") else [one]
        if not all(type(part) in (int, float) for part in parts):
            raise UserError(f"its statistics ({source}) say that {name} is {one!r}; {REMEDY}")


def require(what: str, given: Mapping[str, Any], needed: Iterable[str]) -> None:
    """Raise `UserError` for the first entry that is missing."""
    for name in needed:
        if name not in given:
            raise UserError(f"{what} has no {name}; {REMEDY}")
