"""Auxiliary losses against the per-token reference, and their known values."""

import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_hash.moe.losses import load_balancing_loss, z_loss


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 1000))
def test_losses_and_gradients_equal_the_reference(tokens, num_experts, seed):
    """Both sides in float64; the tolerance is for sums in another order."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, 4, generator=generator, dtype=torch.float64)
    weight_ED = torch.randn(num_experts, 4, generator=generator, dtype=torch.float64)
    ours, naive = weight_ED.clone().requires_grad_(), weight_ED.clone().requires_grad_()
    logits_TE = x_TD @ ours.t()
    probability_TE = logits_TE.softmax(dim=-1)
    rows_E = torch.bincount(probability_TE.argmax(dim=-1), minlength=num_experts)
    balance, z = load_balancing_loss(probability_TE, rows_E), z_loss(logits_TE)
    _, _, balance_ref, z_ref, _ = reference.switch_route(list(x_TD), naive)
    torch.testing.assert_close(balance, balance_ref, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(z, z_ref, rtol=1e-10, atol=1e-12)
    (balance + 2 * z).backward()
    (balance_ref + 2 * z_ref).backward()
    torch.testing.assert_close(ours.grad, naive.grad, rtol=1e-8, atol=1e-10)


def test_balance_loss_is_one_at_perfect_balance_and_e_at_collapse():
    even = torch.eye(4).repeat(3, 1)
    assert load_balancing_loss(even, torch.tensor([3, 3, 3, 3])) == 1
    collapsed = torch.tensor([[1.0, 0, 0, 0]]).repeat(5, 1)
    assert load_balancing_loss(collapsed, torch.tensor([5, 0, 0, 0])) == 4


def test_no_token_costs_nothing_and_keeps_the_graph():
    logits = torch.zeros(0, 4, requires_grad=True)
    total = z_loss(logits) + load_balancing_loss(logits.softmax(-1), torch.zeros(4))
    total.backward()
    assert total == 0 and logits.grad.shape == (0, 4)
