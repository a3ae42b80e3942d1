"""Learned routers on a device against the naive reference: output, report and all gradients, in every dtype."""

import pytest
import torch

from fairseq_hash.moe.routers import BaseRouter, ExpertChoiceRouter, GShardRouter, SinkhornRouter, SwitchRouter
from gpu.layers import DTYPES, Case, check

CASES = {
    "switch": Case("switch"),
    "switch, evaluation": Case("switch", training=False),
    "switch, capacity": Case("switch", capacity=0.75),
    "switch, capacity of eight": Case("switch", capacity=1.0, experts=8, padded=False),
    "switch, shared": Case("switch", shared=True),
    "switch, gated": Case("switch", form="gated", hidden=16),
    "switch, inserted": Case("switch", sublayers=1, roundings=16),
    "base": Case("base"),
    "base, evaluation": Case("base", training=False),
    "base, no padding": Case("base", padded=False),
    "base, capacity": Case("base", capacity=0.75, training=False),
    "base, inserted": Case("base", sublayers=2, roundings=16),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_learned_router_equals_the_naive_loop(case, dtype, device):
    check(CASES[case], DTYPES[dtype], device)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "build",
    [
        lambda: SwitchRouter(16, 8, 0.0, 0),
        lambda: BaseRouter(16, 8, 0),
        lambda: GShardRouter(16, 8, "all", 0),
        lambda: SinkhornRouter(16, 8, 0),
        lambda: ExpertChoiceRouter(16, 8, 2.0, 2.0, 0),
    ],
)
def test_routing_is_in_fp32(build, training, device):
    """Half-precision tokens and weights, and autocast, change nothing but what their values are."""
    router = build().to(device, torch.bfloat16).train(training)
    x_TD = torch.randn(200, 16, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    low = router(x_TD)
    exact = router.float()(x_TD.float())
    with torch.autocast(device.type, dtype=torch.bfloat16):
        under_autocast = router(x_TD)
    for other in (low, under_autocast):
        assert other.weight_TK.dtype == torch.float32
        assert torch.equal(other.expert_TK, exact.expert_TK) and torch.equal(other.weight_TK, exact.weight_TK)


def test_jitter_is_drawn_on_the_device(device):
    """A seed gives one draw; it stays within its range, and evaluation has none."""
    router = SwitchRouter(16, 8, 0.1, 0).to(device)
    x_TD = torch.randn(200, 16, generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(router(x_TD).weight_TK)
    assert torch.equal(*found)
    plain = router.eval()(x_TD).weight_TK
    assert not torch.equal(found[0], plain)
    assert (found[0] - plain).abs().max() < 0.3
