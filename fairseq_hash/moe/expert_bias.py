"""Biases of experts that balance the load without a loss: how an update changes them. Shape suffixes: see `losses`.

A router adds the bias of an expert to its score when it chooses, and leaves it out when it weighs. All functions are
without gradient. N is the number of bins of a histogram.
"""

import torch
from torch import Tensor

from fairseq_hash.moe.kernels.group_sizes import count_groups

BINS = 1000


def sign_step(bias_E: Tensor, tokens_per_expert_E: Tensor, step: float) -> Tensor:
    """Return the bias raised by `step` for an expert below the mean load, and lowered by it for one above.

    Auxiliary-loss-free load balancing (Wang et al. 2024, arXiv 2408.15664), algorithm 1; DeepSeek-V3.
    """
    return bias_E + step * (tokens_per_expert_E.mean() - tokens_per_expert_E).sign().to(bias_E.dtype)


def required_bias_histogram(score_TE: Tensor, cutoff_T: Tensor, bias_E: Tensor) -> Tensor:
    """Return how many tokens need a bias in each bin to choose an expert: int64 `[E, N]`. Histograms add up.

    The bias that an expert needs to be one of a token's K is the cutoff less its score. For scores from 0 to 1 it is
    from min(bias) - 1 to max(bias) + 1; that range has N bins of one width.

    Args:
        score_TE: fp32, from 0 to 1, without bias.
        cutoff_T: the (K + 1)-th largest of score + bias.
        bias_E: fp32, with which the cutoff was found.
    """
    low, width = _bins(bias_E)
    bin_TE = ((cutoff_T.unsqueeze(1) - score_TE - low) / width).long().clamp_(0, BINS - 1)
    bin_TE += BINS * torch.arange(len(bias_E), device=bias_E.device)
    return count_groups(bin_TE.flatten(), BINS * len(bias_E)).view(-1, BINS)


def quantile_bias(histogram_EN: Tensor, bias_E: Tensor, choices: int) -> Tensor:
    """Return the bias with which each expert would have had K / E of the tokens, less the mean over the experts.

    Quantile balancing (Su, kexue.fm/archives/11619), with the histogram and the interpolation of Kimi K3 as in
    torchtitan's pull request 4577 and Megatron-core's 6637: the quantile lies in the first bin at which the cumulated
    count reaches K / E of the tokens, as far from the bin's start as the count requires.

    Args:
        histogram_EN: sum of `required_bias_histogram` over an update, any dtype.
        bias_E: fp32, with which it was made.
        choices: K, less than E.

    Returns:
        fp32 `[E]`; `bias_E` itself without a token.
    """
    histogram_EN = histogram_EN.double()
    reached_EN = histogram_EN.cumsum(dim=1)
    wanted_E1 = reached_EN[:, -1:] * choices / len(bias_E)
    bin_E1 = (reached_EN < wanted_E1).sum(dim=1, keepdim=True)
    inside_E1 = histogram_EN.gather(1, bin_E1)
    before_E1 = reached_EN.gather(1, bin_E1) - inside_E1
    position_E = (bin_E1 + (wanted_E1 - before_E1) / inside_E1).squeeze(1)
    quantile_E = ((position_E - position_E.mean()) * _bins(bias_E)[1]).to(bias_E.dtype)
    return torch.where(reached_EN[:, -1] > 0, quantile_E, bias_E)


def _bins(bias_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the bins begin, and their width."""
    low, high = bias_E.min() - 1, bias_E.max() + 1
    return low, (high - low) / BINS
