"""Every form of experts on a device against the naive reference, and which path serves it."""

import copy

import pytest
import torch

from fairseq_hash.moe.kernels import feed_forward, grouped_mm
from gpu.layers import DTYPES, FP32, ROUNDING, Case, assert_near, check, draw, expected, run, tolerance_of

CASES = {
    "relu": Case(form="relu"),
    "gelu": Case(form="gelu"),
    "relu, recomputed": Case(form="relu", recompute=True),
    "gelu, recomputed": Case(form="gelu", recompute=True),
    "gated": Case(form="gated", hidden=16),
    "gated, recomputed": Case(form="gated", hidden=16, recompute=True),
    "gated with a limit": Case(form="gated", hidden=16, limit=0.5),
    "gated with a limit, two and shared": Case(form="gated", hidden=16, limit=0.5, choices=2, shared=True),
    "gated, learned": Case(form="gated", hidden=16, choices=2, score="sqrt-softplus", recompute=True),
    "stack of 1": Case(sublayers=1, roundings=16),
    "stack of 2": Case(sublayers=2, roundings=16),
    "stack of 2, recomputed": Case(sublayers=2, recompute=True, roundings=16),
    "stack of 1, two": Case(sublayers=1, choices=2, roundings=16),
    "MultiHash, recomputed": Case(segments=2, recompute=True),
    "wider": Case(width=64, hidden=128, experts=8, used=(0, 1, 3, 4, 6)),
    # Rows of 24 and 40 bytes in half precision: no grouped product takes them.
    "odd widths": Case(width=12, hidden=20),
    "odd widths, MultiHash": Case(width=12, hidden=20, segments=4, used=(0, 1, 2, 3)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_experts_equal_the_naive_loop(case, dtype, device):
    check(CASES[case], DTYPES[dtype], device)


@pytest.mark.parametrize("case", ["relu", "gated with a limit", "MultiHash, recomputed"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocast(case, dtype, device):
    """Parameters and input in fp32, products in half precision: one rounding more for each of these."""
    case, dtype = CASES[case], DTYPES[dtype]
    layer = case.build(dtype).float()  # with values that the dtype has: else ReLU's edge would move
    batch = draw(case, layer, dtype)
    batch = type(batch)(batch.token_BL, batch.x_LBD.float(), batch.grad_LBD.float(), batch.table_VK)
    want, _ = expected(case, {name: p.detach().double() for name, p in layer.named_parameters()}, batch)
    with torch.autocast(device.type, dtype=dtype):
        got, _ = run(case, layer.to(device), batch, device)
    assert got.pop("y").dtype == dtype
    for name, tensor in got.items():
        assert tensor.dtype == torch.float32
        assert_near(tensor, want[name], (case.roundings + 2) * ROUNDING[dtype], name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["gelu", "gated with a limit", "stack of 2", "MultiHash, recomputed", "odd widths"])
def test_the_path_taken(case, dtype, device, monkeypatch, record_property):
    """In bf16 on a GPU it is the grouped product, wherever rows are of whole 16 bytes."""
    calls, grouped = [], grouped_mm.grouped_linear
    monkeypatch.setattr(feed_forward, "grouped_linear", lambda *args: calls.append(args) or grouped(*args))
    layer = CASES[case].build(DTYPES[dtype])
    batch = draw(CASES[case], layer, DTYPES[dtype])
    run(CASES[case], layer.to(device), batch, device)
    path = "grouped" if calls else "another"
    record_property("path", path)
    print(f"{device} {dtype} {case}: {path}")
    if case == "odd widths" or device.type == "cpu":
        assert not calls
    elif dtype == "bf16":
        assert calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["relu", "gelu", "gated"])
def test_dropout_keeps_and_scales(form, dtype, device):
    """Its mask is a seed's, forward and backward; what it keeps is scaled."""
    layer = Case(form=form, width=16, hidden=1024, training=True, padded=False).build(DTYPES[dtype])
    layer.experts.dropout = 0.25
    case = Case(form=form, padded=False, hidden=1024)
    batch = draw(case, Case(form="gelu").build(DTYPES[dtype]), DTYPES[dtype])
    layer.to(device)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(run(case, layer, batch, device)[0])
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
    # y is linear in the second map's weight and bias, forward and backward with one mask. An error of each of the
    # gradient's entries, and of y's.
    second = "down" if form == "gated" else "fc2"
    names = [name for name in found[0] if f".{second}_" in name]
    parameters = dict(layer.named_parameters())
    terms = torch.cat([(parameters[name] * found[0][name]).detach().double().flatten() for name in names])
    through_y = found[0]["y"].double() * batch.grad_LBD.to(device).double()
    tolerance = 4 * ROUNDING.get(DTYPES[dtype], FP32) * (terms.abs().sum() + through_y.abs().sum())
    assert abs(terms.sum() - through_y.sum()) <= tolerance
    layer.eval()
    without = run(case, layer, batch, device)[0]["y"]
    assert (found[0]["y"] - without).abs().max() > 0.05 * without.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["gelu", "gated", "stack of 2", "MultiHash, recomputed"])
def test_sums_over_many_rows(case, dtype, device):
    """Gradients of parameters are sums over 10,000 rows: against the same in float64 on the CPU.

    Added up in half precision, such a sum stops growing at 256 or 2048 times the size of a term.
    """
    case, dtype = CASES[case], DTYPES[dtype]
    experts = case.build(dtype).experts
    exact = copy.deepcopy(experts).double()
    groups = case.experts * case.segments
    sizes = (100,) * (groups - 1) + (10_000 - 100 * (groups - 1),)
    generator = torch.Generator().manual_seed(2)
    rows_RD = torch.randn(10_000, case.width, generator=generator).to(dtype)
    grad_RD = (torch.randn(10_000, case.width, generator=generator) + 1).to(dtype)
    exact(rows_RD.double(), sizes).backward(grad_RD.double())
    experts.to(device)
    experts(rows_RD.to(device), sizes).backward(grad_RD.to(device))
    for (name, ours), theirs in zip(experts.named_parameters(), exact.parameters(), strict=True):
        assert_near(ours.grad, theirs.grad, tolerance_of(dtype, 8), name)
