"""A hash layer never waits for the GPU, forward and backward: torch refuses what waits, and so do we."""

import pytest
import torch

from fairseq_hash.hashing.lookup import lookup_rows
from gpu import waits
from gpu.layers import PAD, Batch, Case, backward, context_on, draw, report_gradient, route_on
from gpu.test_features import FEATURES, KEYS, index_of, tokens_with_padding

CASES = {
    "one expert": Case(),
    "relu": Case(form="relu"),
    "two, uniform": Case(choices=2),
    "two, learned": Case(choices=2, score="softmax"),
    "two, sqrt-softplus": Case(choices=2, score="sqrt-softplus"),
    "MultiHash": Case(segments=2),
    "gated": Case(form="gated", limit=0.5),
    "gated, two, learned": Case(form="gated", choices=2, score="sigmoid", limit=0.5),
    "recomputed": Case(recompute=True),
    "gated, recomputed": Case(form="gated", recompute=True),
    "shared": Case(shared=True),
    "stack of 2": Case(sublayers=2),
    "stack of 1, recomputed": Case(sublayers=1, recompute=True),
}


def on_gpu(case, dtype, device):
    """Return the layer, and all that a step needs, on the GPU already; some 500 tokens."""
    layer = case.build(dtype)
    table_VK = draw(case, layer, dtype).table_VK.to(device)
    generator = torch.Generator().manual_seed(3)
    token_BL = torch.randint(PAD + 1, len(table_VK), (8, 64), generator=generator)
    if case.padded:
        token_BL[3, 20:] = PAD
    x_LBD, grad_LBD = (torch.randn(64, 8, case.width, generator=generator).to(device, dtype) for _ in range(2))
    return layer.to(device), Batch(token_BL.to(device), x_LBD.requires_grad_(), grad_LBD, table_VK)


def step(case, layer, batch, place_T=None, grad_report=None):
    """Forward and backward; where padding stands is known, the route is made as the decoder makes it."""
    context = context_on(case, batch, batch.token_BL.device, padding=False)
    if place_T is not None:
        context = type(context)(place_T)
        if case.router == "hash":
            context.hash_routes.append(route_on(case, context.select(batch.token_BL), batch.table_VK))
    y_LBD, packed = layer(batch.x_LBD, context)
    backward(case, y_LBD, packed, batch.grad_LBD, grad_report)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_hash_layer(case, padded, cuda):
    case = CASES[case]
    layer, batch = on_gpu(case, torch.bfloat16, cuda)
    place_T = (batch.token_BL.t().flatten() != PAD).nonzero().squeeze(1) if padded else None
    step(case, layer, batch, place_T)  # tries the grouped product, and makes what is made once
    torch.cuda.synchronize()
    with waits.none_allowed():
        step(case, layer, batch, place_T)


@pytest.mark.parametrize("case", ["one expert", "two, learned", "gated"])
def test_a_hash_layer_under_autocast(case, cuda):
    """fairseq's --amp: parameters in fp32, products in bf16."""
    case = CASES[case]
    layer, batch = on_gpu(case, torch.float32, cuda)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        step(case, layer, batch)
        torch.cuda.synchronize()
        with waits.none_allowed():
            step(case, layer, batch)


def test_dropout(cuda):
    case = Case(form="gelu", recompute=True)
    layer, batch = on_gpu(case, torch.bfloat16, cuda)
    layer.experts.dropout = 0.1
    step(case, layer, batch)
    torch.cuda.synchronize()
    with waits.none_allowed():
        step(case, layer, batch)


@pytest.mark.parametrize("name", FEATURES)
def test_features(name, cuda):
    token_BL = tokens_with_padding().to(cuda)
    index = {key: torch.from_numpy(value).to(cuda) for key, value in index_of(name).items()}
    lookup_rows(FEATURES[name], token_BL, PAD, KEYS, index)
    torch.cuda.synchronize()
    with waits.none_allowed():
        lookup_rows(FEATURES[name], token_BL, PAD, KEYS, index)


def test_a_wait_is_noticed(cuda):
    value = torch.ones(3, device=cuda)
    copied = torch.cuda.Event()
    copied.record()
    for wait in (
        lambda: value.sum().item(),
        lambda: value.nonzero(),
        lambda: copied.synchronize(),
        lambda: torch.cuda.synchronize(),
    ):
        with pytest.raises((RuntimeError, AssertionError), match="synchronizing|waits"), waits.none_allowed():
            wait()
    with waits.recorded() as places:
        value.sum().item()
        copied.synchronize()
    assert {file for file, _ in places} == {__file__} and len(places) >= 2
    assert torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.parametrize(
    "case", [Case("switch"), Case("switch", capacity=1.25), Case("base"), Case("base", training=False)]
)
def test_waits_of_learned_routers(case, cuda, record_property):
    """For information: how often, and where."""
    layer, batch = on_gpu(case, torch.bfloat16, cuda)
    grad_report = report_gradient(case, cuda)
    step(case, layer, batch, grad_report=grad_report)
    torch.cuda.synchronize()
    with waits.recorded() as places:
        step(case, layer, batch, grad_report=grad_report)
    record_property("waits", len(places))
    print(f"{case.router}, {case.capacity}, {case.training}: {len(places)} waits", waits.in_package(places))
