"""Training a part of a sparse model: the experts keep their weights, or all else does. Mostly for fine-tuning."""

from fairseq.modules.checkpoint_activations import unwrap_checkpoint
from torch import nn

from fairseq_hash.moe.layer import SparseLayer


def freeze(model: nn.Module, what: str) -> None:
    """Let a part of a sparse model keep its weights: no gradient, no optimizer state, no weight decay.

    An optimizer that is made later has the other parameters alone, and so has the norm of the gradients.

    `what` is one of `FREEZES`: nothing; the experts of all sparse layers, the shared one included; or all else, routers
    and learned hash weights included. The model is not wrapped for data parallelism yet.
    """
    if what == "none":
        return
    experts = {id(parameter) for parameter in expert_parameters(model)}
    for parameter in model.parameters():
        if (id(parameter) in experts) == (what == "experts"):
            parameter.requires_grad_(False)
    # Activation checkpointing takes gradients to a layer's weights only where its input has one. The first layer that
    # trains has no such input where all below is frozen; and what is below has nothing to recompute.
    for layer in model.decoder.layers if what == "all-but-experts" else ():
        unwrap_checkpoint(layer)
        if any(parameter.requires_grad for parameter in layer.parameters()):
            break


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of this rank's experts, the shared one of each sparse layer included."""
    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
    parts = [part for layer in layers for part in (layer.experts, layer.shared) if part is not None]
    return [parameter for part in parts for parameter in part.parameters()]
