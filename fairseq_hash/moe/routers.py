"""Routers: which expert serves which token, and how much its output weighs.

A router sees the tokens of one batch without padding and returns an `Assignment`. It knows nothing of ranks, of
capacity or of what an expert is. Shape suffixes: see `losses`.
"""

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_hash.core.errors import UserError
from fairseq_hash.moe.balanced_assignment import balanced_assignment
from fairseq_hash.moe.kernels.group_sizes import count_groups
from fairseq_hash.moe.losses import load_balancing_loss, z_loss

SCORES = ("softmax", "sigmoid", "sqrt-softplus")


class Assignment(NamedTuple):
    """A router's decision for T tokens. A tuple, because fairseq's search for NaN looks into what modules return.

    `expert_TK` (int64) names each token's experts. `weight_TK` (fp32, differentiable) scales their outputs; None means
    that they are used as they are. The losses are fp32 scalars, means over the tokens; None where the router has none.
    `entropy` is the mean entropy of the router's distribution over the experts, in nats.
    """

    expert_TK: Tensor
    weight_TK: "Tensor | None" = None
    load_balancing_loss: "Tensor | None" = None
    z_loss: "Tensor | None" = None
    entropy: "Tensor | None" = None


def seeded_generator(*key: "int | str") -> torch.Generator:
    """Return a CPU generator for one part of the model, seeded by torch's initial seed and the part's `key`.

    Weights drawn from it depend neither on what was drawn before nor on how experts are shared out, and drawing them
    leaves torch's own random state alone: the dense parameters of a sparse model start where a dense model's start.
    """
    digest = hashlib.sha256(repr((torch.initial_seed(), *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class SwitchRouter(nn.Module):
    """Learned top-1 routing: the expert's output is scaled by its softmax probability.

    Switch Transformers (Fedus, Zoph, Shazeer 2021), sections 2.1 to 2.4: the router computes in fp32, jitter multiplies
    its input in training, and its weight starts from a truncated normal of variance 0.1 / D.
    """

    def __init__(self, model_width: int, num_experts: int, jitter: float, key: int) -> None:
        super().__init__()
        self.jitter = jitter
        self.weight = nn.Parameter(torch.empty(num_experts, model_width))
        std = math.sqrt(0.1 / model_width)
        nn.init.trunc_normal_(
            self.weight, std=std, a=-2 * std, b=2 * std, generator=seeded_generator("switch router", key)
        )

    def forward(self, x_TD: Tensor) -> Assignment:
        """Assign `x_TD` (any floating dtype) to experts."""
        # Autocast would take the matrix product back to half precision.
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.float()
            if self.training and self.jitter:
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
            logits_TE = F.linear(x_TD, self.weight.float())
            log_probability_TE = logits_TE.log_softmax(dim=-1)
            probability_TE = log_probability_TE.exp()
            weight_TK, expert_TK = probability_TE.max(dim=-1, keepdim=True)
            rows_E = count_groups(expert_TK.flatten(), len(self.weight))
            entropy_T = -(probability_TE.detach() * log_probability_TE.detach()).sum(dim=-1)
            return Assignment(
                expert_TK,
                weight_TK,
                load_balancing_loss(probability_TE, rows_E),
                z_loss(logits_TE),
                entropy_T.sum() / max(len(entropy_T), 1),
            )


class BaseRouter(nn.Module):
    """Balanced assignment in training, the nearest centroid in evaluation, a sigmoid gate in both.

    BASE Layers (Lewis et al. 2021), sections 3.1 to 3.3. The gate, the sigmoid of the token's score for its expert,
    is what trains the centroids; they start orthogonal with gain 0.1, as in the authors' release.
    """

    def __init__(
        self,
        model_width: int,
        num_experts: int,
        key: int,
        assign: Callable[[Tensor], Tensor] = balanced_assignment,
    ) -> None:
        """Make the centroids; `assign` makes experts `[T]` of scores `[T, E]` in training."""
        super().__init__()
        self.assign = assign
        self.centroids = nn.Parameter(torch.empty(num_experts, model_width))
        nn.init.orthogonal_(self.centroids, gain=0.1, generator=seeded_generator("base router", key))

    def forward(self, x_TD: Tensor) -> Assignment:
        """Assign `x_TD` (any floating dtype) to experts.

        Raises:
            ValueError: where a score is NaN or infinite in training.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            score_TE = F.linear(x_TD.float(), self.centroids.float())
            if self.training:
                expert_T = self.assign(score_TE.detach())
            else:
                expert_T = score_TE.argmax(dim=-1)
            expert_TK = expert_T.unsqueeze(1)
            return Assignment(expert_TK, score_TE.gather(1, expert_TK).sigmoid())


class HashWeights(nn.Module):
    """Learned weights of the K experts that a hash table chose for a token: score / (sum of the K scores) x scale.

    The hash layers of DeepSeek-V4. The table alone chooses, so a hash layer never computes an auxiliary loss: there is
    no choice that it could balance.

    The weight starts at zero, so that at first all K experts weigh scale / K: a layer whose K experts are copies of a
    dense FFN then computes what the FFN does (at scale 1).

    Raises:
        UserError: where `score` is none of `SCORES`.
    """

    def __init__(self, model_width: int, num_experts: int, score: str, scale: float) -> None:
        super().__init__()
        if score not in SCORES:
            raise UserError(f"unknown score {score!r} of hash weights; use one of {', '.join(SCORES)}")
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
    """Return the logarithm of a score, up to a constant; finite with finite gradients wherever the logits are finite.

    Args:
        logits: fp32, any shape.
        score: one of `SCORES`.
    """
    if score == "softmax":
        return logits
    if score == "sigmoid":
        return F.logsigmoid(logits)
    # Below -20, softplus is exp to fp32's last bit; further down it underflows, and its logarithm would be infinite.
    log_softplus = torch.where(logits < -20, logits, F.softplus(logits.clamp(min=-20)).log())
    return log_softplus / 2
