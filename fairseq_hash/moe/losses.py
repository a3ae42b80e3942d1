"""Auxiliary losses of learned routers: pure functions of the router's logits.

Shape suffixes, here and in the whole package: B batch, L length, T tokens (B x L), D model width, F width of the FFN's
hidden layer, E experts, K experts a token, R routed rows, V vocabulary, H keys (the rows of a hash table).
"""

from torch import Tensor

from fairseq_hash.moe.kernels.group_sizes import count_groups


def load_balancing_loss(probability_TE: Tensor, rows_E: Tensor) -> Tensor:
    """Return E times the sum over experts of (share of tokens) x (mean router probability): K at perfect balance.

    Switch Transformers (Fedus, Zoph, Shazeer 2021), section 2.2, equations 4 to 6, which have K = 1; with more choices
    a token, the sum over them. The gradient flows through the probabilities only.

    Args:
        probability_TE: softmax of the router's logits, fp32, of the tokens that are routed.
        rows_E: how many of these tokens chose each expert, before any capacity limit.

    Returns:
        A scalar, fp32; 0 where there is no token.
    """
    tokens, experts = probability_TE.shape
    if tokens == 0:
        return probability_TE.sum()  # zero, and still part of the graph
    share_E = rows_E.to(probability_TE.dtype) / tokens
    return experts * (share_E * probability_TE.mean(dim=0)).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Return the mean over tokens of the squared log-sum-exp of the router's logits (fp32 scalar; 0 without tokens).

    ST-MoE (Zoph et al. 2022), section 3, equation 5: it keeps the logits small, where rounding does least harm.
    """
    if logits_TE.shape[0] == 0:
        return logits_TE.sum()
    return logits_TE.logsumexp(dim=-1).square().mean()


def sequence_balancing_loss(probability_TE: Tensor, expert_TK: Tensor, sentence_T: Tensor, sentences: int) -> Tensor:
    """Return the load-balancing loss of each sequence alone, as a mean over tokens: 1 at perfect balance.

    DeepSeek-V3 (2024), section 2.1.2, equations 17 to 20, without their weight. Of a sequence it is E / K times the sum
    over experts of (share of its tokens) x (mean probability over its tokens). A longer sequence counts more, so that
    batches add up. The gradient flows through the probabilities only.

    Args:
        probability_TE: scores over their sum, fp32, of the tokens that are routed.
        expert_TK: int64, the K experts with the largest scores, without any bias.
        sentence_T: int64, the sequence of each token, from 0 to B - 1.
        sentences: B.

    Returns:
        A scalar, fp32; 0 where there is no token.
    """
    tokens, experts = probability_TE.shape
    if tokens == 0:
        return probability_TE.sum()
    group_TK = sentence_T.unsqueeze(1) * experts + expert_TK
    rows_BE = count_groups(group_TK.flatten(), sentences * experts).view(sentences, experts)
    tokens_B = count_groups(sentence_T, sentences).clamp(min=1)
    share_BE = rows_BE / tokens_B.unsqueeze(1)
    # Without a sum of the probabilities by sequence, whose order would change from run to run on a GPU.
    return experts / expert_TK.shape[1] * (probability_TE * share_BE[sentence_T]).sum(dim=-1).mean()


def mean_entropy(probability_TE: Tensor, log_probability_TE: Tensor) -> Tensor:
    """Return the mean over tokens of the entropy of their probabilities: nats, without gradient; 0 without tokens."""
    entropy_T = -(probability_TE.detach() * log_probability_TE.detach()).sum(dim=-1)
    return entropy_T.sum() / max(len(entropy_T), 1)
