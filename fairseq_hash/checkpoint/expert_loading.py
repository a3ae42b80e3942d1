"""How a sparse layer takes its experts out of a state of all: from tensors, or from shards."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fairseq_hash.checkpoint.sharded_tensor import SavedExperts, take
from fairseq_hash.core.errors import UserError
from fairseq_hash.moe.mapped_experts import MappedExperts
from fairseq_hash.parallel.groups import ExpertParallel


def fit_experts(value: Any, parallel: ExpertParallel, shape: torch.Size, where: str) -> None:
    """Raise `UserError` unless a saved tensor has this model's number of experts and the `shape` of each."""
    if len(value) != parallel.num_experts:
        raise UserError(
            f"it has {len(value)} experts in {where}, this model has {parallel.num_experts}; give --num-experts "
            f"{len(value)}, or another --save-dir to start anew"
        )
    if tuple(value.shape[1:]) != tuple(shape):
        raise UserError(
            f"the experts in {where} have shape {tuple(value.shape[1:])}, those of this model {tuple(shape)}; give "
            "the sizes that the checkpoint was trained with"
        )


def take_own_experts(layer: nn.Module, parallel: ExpertParallel, shapes: Mapping[str, torch.Size]) -> None:
    """Make `layer` take its own experts' rows out of a state of all experts when it loads one.

    A state that fully sharded data parallel made holds what the rank holds, under another name: it is left as it is.

    `shapes` are those of its parameters, `[e, ...]` by name, before anything wraps them.
    """

    def take_own(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if any(prefix + name not in state for name in shapes):
            return
        own = dict(module.named_parameters())
        for name, shape in shapes.items():
            value = state[prefix + name]
            fit_experts(value, parallel, shape[1:], prefix.rstrip("."))
            if isinstance(module.experts, MappedExperts):
                module.experts.leave_in_file(name.removeprefix("experts."), state.pop(prefix + name))
            elif isinstance(value, SavedExperts) and name in own:
                value.read_into(parallel.expert_ids, own[name].detach())
                state[prefix + name] = own[name].detach()  # torch copies it onto itself
            else:
                state[prefix + name] = take(value, parallel.expert_ids)

    layer.register_load_state_dict_pre_hook(take_own)
