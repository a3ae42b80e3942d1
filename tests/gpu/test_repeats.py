"""Layers on a device twice, to the last bit; and layers whose batch has no token."""

import pytest
import torch

from gpu.layers import DTYPES, PAD, Batch, Case, draw, run

CASES = {
    "one expert": Case(),
    "relu": Case(form="relu"),
    "gated": Case(form="gated", hidden=16, limit=0.5),
    "two, uniform": Case(choices=2),
    "two, learned": Case(choices=2, score="sigmoid"),
    "two, sqrt-softplus": Case(choices=2, score="sqrt-softplus", form="gated", hidden=16),
    "MultiHash": Case(segments=2),
    "recomputed": Case(recompute=True),
    "capacity": Case(capacity=0.75),
    "shared": Case(shared=True),
    "stack of 1": Case(sublayers=1),
    "stack of 2": Case(sublayers=2),
    "odd widths": Case(width=12, hidden=20),
    "switch": Case("switch"),
    "switch, capacity": Case("switch", capacity=0.75),
    "base": Case("base"),
    "base, evaluation": Case("base", training=False),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_layer_repeats_to_the_last_bit(case, dtype, device):
    """With some 1500 tokens, so that sums are long enough to be made in more than one order."""
    case, dtype = CASES[case], DTYPES[dtype]
    layer = case.build(dtype)
    generator = torch.Generator().manual_seed(3)
    small = draw(case, layer, dtype)
    token_BL = torch.randint(PAD + 1, len(small.table_VK), (24, 64), generator=generator)
    token_BL[5, 20:] = PAD
    x_LBD, grad_LBD = (torch.randn(64, 24, case.width, generator=generator).to(dtype) for _ in range(2))
    batch = Batch(token_BL, x_LBD, grad_LBD, small.table_VK)
    layer.to(device)
    (first, report), *others = [run(case, layer, batch, device) for _ in range(3)]
    for other, other_report in others:
        assert torch.equal(report, other_report)
        for name, tensor in first.items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(3, 14), (2, 0)], ids=["padding", "nothing"])
def test_a_batch_without_tokens(shape, case, dtype, device):
    """Nothing but padding, or nothing at all: output and every gradient are zero."""
    case, dtype = CASES[case], DTYPES[dtype]
    layer = case.build(dtype)
    token_BL = torch.full(shape, PAD)
    zero_LBD = torch.randn(shape[1], shape[0], case.width).to(dtype)
    batch = Batch(token_BL, zero_LBD, zero_LBD, draw(case, layer, dtype).table_VK)
    found, report = run(case, layer.to(device), batch, device)
    assert not report.any()
    for name, tensor in found.items():
        assert not tensor.any(), name
