"""Learned weights of the experts that a hash table chose: no router. Shape suffixes: see `losses`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCORES = ("softmax", "sigmoid", "sqrt-softplus")


class HashWeights(nn.Module):
    """Learned weights of the K experts that a hash table chose for a token: score / (sum of the K scores) x scale.

    The hash layers of DeepSeek-V4. The table alone chooses, so a hash layer never computes an auxiliary loss: there is
    no choice that it could balance.

    The weight starts at zero, so that at first all K experts weigh scale / K: a layer whose K experts are copies of a
    dense FFN then computes what the FFN does (at scale 1).
    """

    def __init__(self, model_width: int, num_experts: int, score: str, scale: float) -> None:
        super().__init__()
        self.score = score
        self.scale = scale
        self.weight = nn.Parameter(torch.zeros(num_experts, model_width))

    def forward(self, x_TD: Tensor, expert_TK: Tensor) -> Tensor:
        """Return the weights of experts `expert_TK` (int64) for `x_TD` (any floating dtype): fp32 `[T, K]`."""
        # Autocast would take the matrix product back to half precision.
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TK = F.linear(x_TD.float(), self.weight.float()).gather(1, expert_TK)
            # Scores over their sum are the softmax of their logarithms, where nothing underflows. For the softmax over
            # all experts the logarithms are the logits less what all E logits share, which drops out over the K.
            return log_score(logits_TK, self.score).softmax(dim=-1) * self.scale


def log_score(logits: Tensor, score: str) -> Tensor:
    """Return the logarithm of a score of `SCORES`, up to a constant, for logits (fp32, any shape).

    It is finite, with finite gradients, wherever the logits are.
    """
    if score == "softmax":
        return logits
    if score == "sigmoid":
        return F.logsigmoid(logits)
    # Below -20, softplus is exp to fp32's last bit; further down it underflows, and its logarithm would be infinite.
    log_softplus = torch.where(logits < -20, logits, F.softplus(logits.clamp(min=-20)).log())
    return log_softplus / 2
