"""Learned top-k routing with the ways to balance it of 2024 to 2026. Shape suffixes: see `losses`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.expert_bias import quantile_bias, required_bias_histogram, sign_step
from fairseq_hash.moe.hash_weights import log_score
from fairseq_hash.moe.kernels.group_sizes import count_groups
from fairseq_hash.moe.losses import load_balancing_loss, mean_entropy, sequence_balancing_loss, z_loss
from fairseq_hash.moe.routers.registry import RouterSettings, register_router
from fairseq_hash.moe.routers.switch import draw_weight
from fairseq_hash.moe.routing_context import RoutedTokens
from fairseq_hash.moe.routing_stats import statistic

BALANCINGS = ("none", "loss", "bias", "quantile")
BY_BIAS = ("bias", "quantile")


@dataclass(frozen=True)
class TopKStatistics:
    """What a top-k router logs; the losses are differentiable. What the options do not ask for is 0."""

    router_entropy: Tensor = statistic("mean entropy of the scores over their sum, in nats; 0: it is certain")
    balance_loss: Tensor = statistic(
        "load-balancing loss, without its weight; K: balanced; 0 without --balancing loss", "load_balance_weight"
    )
    sequence_loss: Tensor = statistic(
        "load-balancing loss of each sequence, without its weight; 1: balanced; 0 without --sequence-loss",
        "sequence_loss_weight",
    )
    z_loss: Tensor = statistic("z-loss, without its weight", "z_loss_weight")
    bias_max: Tensor = statistic("largest magnitude of an expert's bias, in units of the score")


@register_router("topk")
class TopKRouter(nn.Module):
    """The K experts with the largest score, or score + bias; the scores alone weigh their outputs.

    With K = 1, softmax and a loss it is the Switch router without jitter. With sigmoid, a bias, normalised weights and
    a scale it is the router of DeepSeek-V3 (2024), section 2.1.2, without groups of experts. It computes in fp32.

    Attributes:
        bias_E: fp32 buffer, in any precision of the model; None if no bias balances. Only an update changes it.
    """

    statistics = TopKStatistics
    bias_E: "Tensor | None"

    def __init__(
        self,
        model_width: int,
        num_experts: int,
        top_k: int,
        key: int,
        *,
        balancing: str = "loss",
        score: str = "softmax",
        normalize: bool = False,
        scale: float = 1.0,
        bias_step: float = 0.001,
        smoothing: float = 0.0,
        sequence_loss: bool = False,
    ) -> None:
        """Make the router; `TopKOptions` says what the keywords mean, `key` is of its random numbers."""
        super().__init__()
        self.top_k = top_k
        self.balancing = balancing
        self.score = score
        self.normalize = normalize
        self.scale = scale
        self.bias_step = bias_step
        self.smoothing = smoothing
        self.sees_tokens = sequence_loss
        self.weight = draw_weight(model_width, num_experts, key)
        self.register_buffer("bias_E", torch.zeros(num_experts) if balancing in BY_BIAS else None)

    @classmethod
    def build(cls, settings: RouterSettings) -> "TopKRouter":
        """Make the router of one layer."""
        options = settings.options
        return cls(
            settings.model_width,
            settings.num_experts,
            options.experts_per_token,
            settings.layer,
            balancing=options.balancing,
            score=options.router_score,
            normalize=options.normalize_weights,
            scale=options.router_scale,
            bias_step=options.bias_step,
            smoothing=options.quantile_smoothing,
            sequence_loss=options.sequence_loss,
        )

    def forward(self, x_TD: Tensor, tokens: "RoutedTokens | None" = None) -> Assignment:
        """Assign `x_TD` (any floating dtype) to experts; `tokens` if it `sees_tokens`."""
        # Autocast would take the matrix product back to half precision.
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
            log_score_TE = log_score(logits_TE, self.score)
            log_probability_TE = log_score_TE.log_softmax(dim=-1)  # of the scores over their sum
            probability_TE = log_probability_TE.exp()
            score_TE = probability_TE if self.score == "softmax" else log_score_TE.exp()
            expert_TK, histogram_EN = self._choose(score_TE.detach())
            if self.normalize:
                weight_TK = log_score_TE.gather(1, expert_TK).softmax(dim=-1)
            else:
                weight_TK = score_TE.gather(1, expert_TK)
            balance_loss = sequence_loss = bias_max = logits_TE.new_zeros(())
            if self.balancing == "loss":
                balance_loss = load_balancing_loss(probability_TE, count_groups(expert_TK.flatten(), len(self.weight)))
            if tokens is not None:
                best_TK = expert_TK if self.bias_E is None else _largest(score_TE.detach(), self.top_k)
                sequence_loss = sequence_balancing_loss(probability_TE, best_TK, tokens.sentence_T, tokens.sentences)
            if self.bias_E is not None:
                bias_max = self.bias_E.abs().max()
            statistics = TopKStatistics(
                mean_entropy(probability_TE, log_probability_TE),
                balance_loss,
                sequence_loss,
                z_loss(logits_TE),
                bias_max,
            )
            update_sums_N = None if histogram_EN is None else histogram_EN.flatten().float()
            return Assignment(expert_TK, weight_TK * self.scale, statistics, update_sums_N=update_sums_N)

    def _choose(self, score_TE: Tensor) -> "tuple[Tensor, Tensor | None]":
        """Return the experts of each token, and, in training for quantile balancing, the histogram `[E, N]`."""
        if self.bias_E is None:
            return _largest(score_TE, self.top_k), None
        biased_TE = score_TE + self.bias_E
        if self.balancing == "bias" or not self.training:
            return _largest(biased_TE, self.top_k), None
        best_TK, expert_TK = biased_TE.topk(self.top_k + 1, dim=-1)
        return expert_TK[:, :-1], required_bias_histogram(score_TE, best_TK[:, -1], self.bias_E)

    @torch.no_grad()
    def after_update(self, tokens_per_expert_E: Tensor, histogram_EN: "Tensor | None" = None) -> None:
        """Change the bias by what the tokens of an update chose, or would have needed to choose (flat, `[E x N]`)."""
        if self.bias_E is None or not self.weight.requires_grad:  # a frozen router keeps its bias
            return
        if histogram_EN is None:
            self.bias_E.copy_(sign_step(self.bias_E, tokens_per_expert_E, self.bias_step))
        else:
            quantile_E = quantile_bias(histogram_EN.view(len(self.bias_E), -1), self.bias_E, self.top_k)
            self.bias_E.lerp_(quantile_E, 1 - self.smoothing)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Do what `to`, `half` and the like do, but leave the bias in fp32: half precision would lose its steps."""
        bias_E = self.bias_E
        super()._apply(fn, recurse)
        if bias_E is not None and self.bias_E is not None and self.bias_E.dtype != bias_E.dtype:
            self.bias_E = bias_E.to(self.bias_E.device)
        return self


def _largest(score_TE: Tensor, choices: int) -> Tensor:
    """Return the experts with the largest scores, int64 `[T, K]`; the first of equal ones if K is 1."""
    if choices == 1:
        return score_TE.argmax(dim=-1, keepdim=True)
    return score_TE.topk(choices, dim=-1).indices
