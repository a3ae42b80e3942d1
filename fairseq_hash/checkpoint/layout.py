"""Which tensors of a model and its optimizer are experts', and go to shards."""

from typing import Any

import torch
from fairseq.optim import FairseqOptimizer
from torch import Tensor, nn

from fairseq_hash.layer import SparseLayer


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters `[e, ...]` of this rank's experts, by their names in the model's state."""
    return {
        f"{prefix}.experts.{name}": parameter
        for prefix, layer in model.named_modules()
        if isinstance(layer, SparseLayer)
        for name, parameter in layer.experts.named_parameters()
    }


def optimized(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters that an optimizer changes, in its order: in half precision, their fp32 copies."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def expert_numbers(optimizer: FairseqOptimizer, model: nn.Module) -> dict[str, int]:
    """Return the number by which the optimizer's state knows each expert parameter.

    Empty where the optimizer has no state of its own for them: all parameters are flattened into one (`--fp16`), or
    shared out over the ranks (`--zero-sharding`). Such a state stays whole.
    """
    if hasattr(optimizer.optimizer, "consolidate_state_dict"):
        return {}
    names = {id(parameter): name for name, parameter in expert_parameters(model).items()}
    copies = getattr(optimizer, "fp32_params", None)
    if isinstance(copies, list):  # fairseq's FP16Optimizer, in the order of the originals
        pairs = zip(optimizer.fp16_params, copies, strict=True)
        names.update({id(copy): names[id(parameter)] for parameter, copy in pairs if id(parameter) in names})
    numbered = enumerate(optimized(optimizer.optimizer))
    return {names[id(parameter)]: number for number, parameter in numbered if id(parameter) in names}


def is_per_element(value: Any) -> bool:
    """Return whether an optimizer holds this value for each element of a parameter (a moment), not once (a step)."""
    return isinstance(value, Tensor) and value.dim() > 0


def expert_moments(state: dict[str, Any], numbers: dict[str, int]) -> dict[str, Tensor]:
    """Return what an optimizer's state dict holds of the experts: `parameter/moment` to `[e, ...]`."""
    return {
        f"{name}/{key}": value
        for name, number in numbers.items()
        for key, value in state["state"].get(number, {}).items()
        if is_per_element(value)
    }


def without_experts(state: dict[str, Any], numbers: dict[str, int]) -> dict[str, Any]:
    """Return an optimizer's state dict without what `expert_moments` returns."""
    kept = dict(state["state"])
    for number in numbers.values():
        if number in kept:
            kept[number] = {key: value for key, value in kept[number].items() if not is_per_element(value)}
    return {**state, "state": kept}
