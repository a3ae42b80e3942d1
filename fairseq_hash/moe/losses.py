"""Auxiliary losses of learned routers: pure functions of the router's logits.

Shape suffixes, here and in the whole package: B batch, L length, T tokens (B x L), D model width, F width of the FFN's
hidden layer, E experts, K experts a token, R routed rows, V vocabulary, H keys (the rows of a hash table).
"""

from torch import Tensor


def load_balancing_loss(probability_TE: Tensor, rows_E: Tensor) -> Tensor:
    """Return E times the sum over experts of (share of tokens) x (mean router probability): 1 at perfect balance.

    Switch Transformers (Fedus, Zoph, Shazeer 2021), section 2.2, equations 4 to 6. The gradient flows through the
    probabilities only.

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
