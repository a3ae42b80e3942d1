"""What a model of this package says of itself to those who train, save and evaluate it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class ModelState:
    """The record that `hash_transformer_lm` has as its attribute `hash_state`.

    Attributes:
        options: the options of its sparse layers (`SparseOptions`); None for a model of fairseq's own.
        is_oracle: whether it sees the token that it is to predict.
        from_dense: the checkpoint of a dense model that a new training starts from, or "".
        freeze: what keeps its weights in training: `none`, `experts` or `all-but-experts`.
        facts: what a checkpoint's manifest says of it.
    """

    options: Any = None
    is_oracle: bool = False
    from_dense: str = ""
    freeze: str = "none"
    facts: Mapping[str, Any] = field(default_factory=dict)


def state_of(model: nn.Module) -> ModelState:
    """Return a model's record; of a model of fairseq's own, one that says that it has nothing of ours."""
    return getattr(model, "hash_state", ModelState())
