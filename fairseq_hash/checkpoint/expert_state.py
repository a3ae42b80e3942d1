"""Which tensors of a model and its optimizer are experts', and go to shards."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fairseq_hash.checkpoint.sharded_tensor import SavedExperts
from fairseq_hash.moe.expert_layers import expert_layers

if TYPE_CHECKING:  # checkpoints are read, merged and shown without fairseq
    from fairseq.optim import FairseqOptimizer


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters `[e, ...]` of this rank's experts, by their names in the model's state."""
    return {
        f"{prefix}.experts.{name}": parameter
        for prefix, layer in expert_layers(model).items()
        for name, parameter in layer.experts.named_parameters()
    }


def optimized(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters that an optimizer changes, in its order: in half precision, their fp32 copies."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def expert_numbers(optimizer: "FairseqOptimizer", model: nn.Module) -> dict[str, int]:
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


def is_per_element(value: Any, shape: torch.Size) -> bool:
    """Return whether an optimizer holds this value for each element of a parameter of `shape`: a moment.

    Others are single numbers (a step), or sums over rows or columns (Adafactor), which stay whole.
    """
    return isinstance(value, Tensor | SavedExperts) and len(value.shape) > 0 and value.shape == shape


def take_moments(
    state: dict[str, Any], numbers: Mapping[str, int], parameters: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an optimizer's state dict without the experts' moments, and these: `parameter/moment` to `[e, ...]`.

    The state dict itself is left as it is; for `numbers` see `expert_numbers`.
    """
    kept, moments = dict(state["state"]), {}
    for name, number in numbers.items():
        for key, value in kept.get(number, {}).items():
            if is_per_element(value, parameters[name].shape):
                moments[f"{name}/{key}"] = value
        if number in kept:
            kept[number] = {key: value for key, value in kept[number].items() if f"{name}/{key}" not in moments}
    return {**state, "state": kept}, moments
