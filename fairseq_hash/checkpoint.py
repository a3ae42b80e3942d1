"""Shared experts in checkpoints: one logical state of all experts, whatever the number of ranks that wrote it.

A checkpoint holds every expert, in the order of their ids, so that it loads at any number of ranks: each takes its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fairseq_hash.errors import UserError
from fairseq_hash.parallel import ExpertParallel


def gather_experts(tensor_e: Tensor, parallel: ExpertParallel) -> Tensor:
    """Return all experts' rows `[E, ...]` on the CPU of rank 0, and `tensor_e` itself on all others.

    Every rank of the first group has to call this; on the other groups, which hold the same, it does nothing.
    """
    if not parallel.is_shared or not parallel.saves:
        return tensor_e
    # As bytes: gloo does not know every type.
    own = tensor_e.detach().contiguous().view(torch.uint8)
    parts = [torch.empty_like(own) for _ in range(parallel.size)] if parallel.place == 0 else None
    dist.gather(own, parts, dst=0, group=parallel.group)
    return tensor_e if parts is None else torch.cat([part.cpu() for part in parts]).view(tensor_e.dtype)


def take_experts(tensor_E: Tensor, parallel: ExpertParallel, where: str) -> Tensor:
    """Return the rows of this rank's experts.

    Raises:
        UserError: where the checkpoint has another number of experts.
    """
    if len(tensor_E) != parallel.num_experts:
        raise UserError(
            f"the checkpoint has {len(tensor_E)} experts in {where}, this model has {parallel.num_experts}; "
            "give the --num-experts it was trained with"
        )
    return tensor_E[parallel.expert_ids.start : parallel.expert_ids.stop]


def keep_all_experts(layer: nn.Module, parallel: ExpertParallel, names: Sequence[str]) -> None:
    """Make the state of `layer` hold all experts: gathered when it is taken, cut and checked when it is loaded.

    A state also says which experts it holds (`expert_ids`, int64). One that fully sharded data parallel made holds what
    the rank holds, under another name: it is left as it is, and checked.

    Args:
        layer: a module.
        parallel: who shares its experts.
        names: its parameters that have the experts as first dimension.
    """
    ids = torch.tensor(parallel.expert_ids)
    ids.expert = True
    layer.register_buffer("expert_ids", ids)
    names = [*names, "expert_ids"]

    def gather(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if all(prefix + name in state for name in names):
            for name in names:
                state[prefix + name] = gather_experts(state[prefix + name], parallel)

    def take(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        where = prefix.rstrip(".")
        held = state.setdefault(prefix + "expert_ids", torch.arange(parallel.num_experts))  # older ones do not say
        if all(prefix + name in state for name in names):
            for name in names:
                state[prefix + name] = take_experts(state[prefix + name], parallel, where)
            held = state[prefix + "expert_ids"]
        if held.tolist() != list(parallel.expert_ids):
            raise UserError(
                f"the checkpoint has experts {held.tolist()} in {where} for rank {parallel.rank}, which holds "
                f"{list(parallel.expert_ids)}; load it with the number of ranks that saved it"
            )

    layer.register_state_dict_post_hook(gather)
    layer.register_load_state_dict_pre_hook(take)


def optimizer_state_of_all(
    state: dict[str, Any], parameters: Sequence[nn.Parameter], parallel: ExpertParallel
) -> dict[str, Any]:
    """Return an optimizer's state dict with all experts' state on rank 0; every rank has to call this."""
    return _with_experts(state, parameters, lambda value: gather_experts(value, parallel))


def optimizer_state_of_own(
    state: dict[str, Any], parameters: Sequence[nn.Parameter], parallel: ExpertParallel
) -> dict[str, Any]:
    """Return a state dict made by `optimizer_state_of_all` with the state of this rank's experts."""
    return _with_experts(state, parameters, lambda value: take_experts(value, parallel, "the optimizer's state"))


def _with_experts(
    state: dict[str, Any], parameters: Sequence[nn.Parameter], change: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Change what an optimizer holds for each element of an expert's parameter, such as Adam's two moments."""
    changed = dict(state["state"])
    # torch numbers the parameters of all groups one after the other.
    for number, parameter in enumerate(parameters):
        if hasattr(parameter, "expert") and number in changed:
            changed[number] = {
                key: change(value) if torch.is_tensor(value) and value.dim() else value
                for key, value in changed[number].items()
            }
    return {**state, "state": changed}
