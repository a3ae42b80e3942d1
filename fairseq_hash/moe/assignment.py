"""What a router decides for the tokens of one batch. Shape suffixes: see `losses`."""

from typing import Any, NamedTuple

from torch import Tensor


class Assignment(NamedTuple):
    """A router's decision for T tokens. A tuple, because fairseq's search for NaN looks into what modules return.

    Attributes:
        expert_TK: int64, the K experts of each token.
        weight_TK: fp32, differentiable, what scales the experts' outputs; None: they are used as they are.
        statistics: a dataclass of the router's own: named fp32 scalars, means over the tokens (`routing_stats`); None
            if the router has none.
        update_sums_N: fp32, what else the router's `after_update` wants to know, as sums over the tokens, without
            gradient; None if it wants nothing.
        order_C: int64, the places of the choices in the flattened `[T, K]`, in the order in which an expert with a
            capacity takes them. A place that it leaves out is no choice, whatever `expert_TK` holds there. None: all
            places, as they stand.
        over_kept: whether the weights of a token's choices that are not dropped are divided by their sum.
    """

    expert_TK: Tensor
    weight_TK: "Tensor | None" = None
    statistics: Any = None
    update_sums_N: "Tensor | None" = None
    order_C: "Tensor | None" = None
    over_kept: bool = False
