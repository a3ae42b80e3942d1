"""The gate: what scales the experts' outputs, so that the loss has a gradient for the router. Shape suffixes: `losses`.

Hash layers use an expert's output as it is. Switch (Fedus et al. 2021, section 2.1) scales it by a probability, BASE
(Lewis et al. 2021, section 3.1) by a sigmoid. A young router's gate is small, and so is then what its experts add.
"""

from torch import Tensor

GATES = ("value", "one")


def gate_weights(weight_TK: Tensor, kind: str) -> Tensor:
    """Return what scales the outputs of a token's K experts.

    `value` leaves the router's weights as they are. `one` is straight through: the weights have the value 1 / K, so
    that they sum to exactly 1 as those of a uniform hash layer do, and the gradient of the router's own.
    """
    if kind == "value":
        return weight_TK
    return weight_TK - weight_TK.detach() + 1 / weight_TK.shape[1]
