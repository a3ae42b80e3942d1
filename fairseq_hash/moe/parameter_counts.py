"""How many parameters a model has, whichever ranks hold them."""

from collections.abc import Sequence

from torch import nn

from fairseq_hash.moe.expert_layers import ExpertLayer, expert_layers


def whole_size(parameter: nn.Parameter) -> int:
    """Return the number of elements of a parameter, of which fairscale may have left this rank a shard."""
    return parameter._orig_size.numel() if hasattr(parameter, "_orig_size") else parameter.numel()


def layers_and_dense(model: nn.Module) -> tuple[list[ExpertLayer], list[nn.Parameter]]:
    """Return a model's layers with experts, and its parameters that are not of the experts they choose among.

    A memory's rows count as experts here.
    """
    layers = list(expert_layers(model).values())
    experts = {id(parameter) for layer in layers for parameter in layer.experts.parameters()}
    return layers, [parameter for parameter in model.parameters() if id(parameter) not in experts]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return all parameters of a model, those on other ranks included, and those that one token uses.

    A token uses K experts of each sparse layer, and the shared one; of a memory the rows that it looks up.
    """
    layers, others = layers_and_dense(model)
    dense = sum(map(whole_size, others))
    return dense + count_experts(layers), dense + sum(layer.active_size for layer in layers)


def count_trained(model: nn.Module) -> int:
    """Return the parameters of a model that are not frozen, those on other ranks included."""
    layers, others = layers_and_dense(model)
    dense = sum(whole_size(parameter) for parameter in others if parameter.requires_grad)
    return dense + count_trained_experts(layers)


def count_experts(layers: Sequence[ExpertLayer]) -> int:
    """Return the parameters of the experts that layers choose among, those on other ranks included."""
    return sum(layer.parallel.num_experts * layer.expert_size for layer in layers)


def count_trained_experts(layers: Sequence[ExpertLayer]) -> int:
    """Return those of `count_experts` that are not frozen; the experts of a layer are frozen together."""
    return count_experts([layer for layer in layers if all(p.requires_grad for p in layer.experts.parameters())])
