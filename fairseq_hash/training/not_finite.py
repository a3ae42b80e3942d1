"""Which experts are to blame where a training meets NaN or infinity."""

import re
from collections.abc import Callable

from torch import Tensor, nn

from fairseq_hash.moe.expert_layers import expert_layers
from fairseq_hash.moe.layer import SparseLayer

MOST = 4  # experts that are named


def experts_not_finite(model: nn.Module, losses_are_finite: bool = True) -> list[str]:
    """Return what of this rank's experts is not finite, such as "the weights of expert 3 of layer 1".

    These are weights; if all weights are finite, and so are all gradients of other parameters, they are gradients.
    Where other gradients are NaN, or the losses of all ranks are not finite, those of experts say nothing: one NaN of
    the loss is in all of them.
    """
    found = _not_finite(model, "weights", lambda parameter: parameter.detach())
    if found or not losses_are_finite:
        return found
    own = {parameter for _, layer in _sparse_layers(model) for parameter in layer.experts.parameters()}
    others = [p.grad for p in model.parameters() if p.grad is not None and p not in own]
    if not all(bool(grad.isfinite().all()) for grad in others):
        return []
    return _not_finite(model, "gradients", lambda parameter: parameter.grad)


def blame(found: list[str]) -> str:
    """Return what to add to a message about NaN; nothing where no expert is to blame. Replicas are named once."""
    found = list(dict.fromkeys(found))
    more = f" and {len(found) - MOST:,} others" if len(found) > MOST else ""
    return f"; not finite: {', '.join(found[:MOST])}{more}" if found else ""


def _sparse_layers(model: nn.Module) -> list[tuple[str, SparseLayer]]:
    """Return the sparse layers by the words for their place."""
    layers = []
    for name, layer in expert_layers(model).items():
        if isinstance(layer, SparseLayer):
            number = re.search(r"layers\.(\d+)\.", name)
            layers.append((f"layer {number[1]}" if number else name, layer))
    return layers


def _not_finite(model: nn.Module, what: str, values: "Callable[[nn.Parameter], Tensor | None]") -> list[str]:
    """Return the experts of which a kind of values is not finite, in words."""
    found = []
    for place, layer in _sparse_layers(model):
        tensors = [values(parameter) for parameter in layer.experts.parameters()]
        finite = [tensor.isfinite().flatten(1).all(dim=1).tolist() for tensor in tensors if tensor is not None]
        for expert, *is_finite in zip(layer.parallel.expert_ids, *finite, strict=bool(finite)):
            if not all(is_finite):
                found.append(f"the {what} of expert {expert} of {place}")
    return found
