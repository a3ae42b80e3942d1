"""Grouped products on a device against one product a group in float64: output and all gradients."""

import pytest
import torch

from fairseq_hash.moe.kernels.fused_loop import HiddenLayer, Weights, fused_feed_forward
from fairseq_hash.moe.kernels.group_sizes import GroupSizes, count_groups
from fairseq_hash.moe.kernels.grouped_mm import grouped_linear, serves
from gpu.layers import DTYPES, assert_near, tolerance_of

SIZES = {
    "mixed": (3, 13, 5, 1, 4, 31),
    "first empty": (0, 7, 9, 2),
    "middle empty": (5, 0, 0, 11),
    "last empty": (6, 17, 3, 0, 0),
    "most empty": (0, 0, 40, 0, 0, 0),
    "all in the first": (33, 0, 0),
    "all in the last": (0, 0, 33),
    "one group": (29,),
    "none": (0, 0, 0),
    "even": (16,) * 8,
    "many": tuple(n % 7 for n in range(64)),
    "uneven": (1, 700, 0, 2, 129),
}
# Before and after: as experts have them, the smallest that there are, and ones that are no multiple of 64.
WIDTHS = [(16, 32), (64, 16), (8, 8), (72, 200)]


def problem(sizes, widths, dtype, bias=True):
    """Rows, weight, bias and the gradient to start from, on the CPU and rounded."""
    generator = torch.Generator().manual_seed(sum(sizes) + widths[0])
    before, after = widths
    shapes = [(sum(sizes), before), (len(sizes), after, before), (len(sizes), after), (sum(sizes), after)]
    rows, weight, bias_GO, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return rows, weight, bias_GO if bias else None, grad


def naive(rows, weight, bias, grad, sizes):
    """One group after the other, in float64."""
    inputs = [tensor.double().requires_grad_() for tensor in (rows, weight, bias) if tensor is not None]
    parts, first = [inputs[0][:0] @ inputs[1][0].t()], 0
    for group, size in enumerate(sizes):
        part = inputs[0][first : first + size] @ inputs[1][group].t()
        parts.append(part if bias is None else part + inputs[2][group])
        first += size
    out = torch.cat(parts)
    return out.detach(), torch.autograd.grad(out, inputs, grad.double())


@pytest.mark.parametrize("on_device", [True, False], ids=["sizes on the device", "sizes on the host"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_products_equal_a_loop(sizes, widths, bias, on_device, device):
    """In bf16: a rounding of the product, of the bias and of the sum."""
    sizes, dtype = SIZES[sizes], torch.bfloat16
    tensors = problem(sizes, widths, dtype, bias)
    want, want_gradients = naive(*tensors, sizes)
    *inputs, grad = (None if tensor is None else tensor.to(device) for tensor in tensors)
    inputs = [None if tensor is None else tensor.requires_grad_() for tensor in inputs]
    out = grouped_linear(*inputs, GroupSizes(torch.tensor(sizes).to(device) if on_device else sizes))
    assert out.dtype == dtype and out.device.type == device.type
    gradients = torch.autograd.grad(out, [tensor for tensor in inputs if tensor is not None], grad)
    assert_near(out, want, tolerance_of(dtype, 3), "out")
    for name, ours, theirs in zip(("rows", "weight", "bias"), gradients, want_gradients, strict=False):
        assert_near(ours, theirs, tolerance_of(dtype, 3), name)
        if name != "rows":
            for group, size in enumerate(sizes):
                assert size or not ours[group].any(), f"{name}: group {group} has no rows"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_loop_over_groups(sizes, dtype, device):
    """What serves where grouped products do not, with the identity between its two maps."""
    sizes, dtype = SIZES[sizes], DTYPES[dtype]
    rows, fc1, bias1, _ = problem(sizes, (16, 24), dtype)
    _, fc2, bias2, grad = problem(sizes, (24, 16), dtype)
    inputs = [tensor.double().requires_grad_() for tensor in (rows, fc1, bias1, fc2, bias2)]
    parts, first = [inputs[0][:0]], 0
    for group, size in enumerate(sizes):
        before = inputs[0][first : first + size] @ inputs[1][group].t() + inputs[2][group]
        parts.append(torch.tanh(before) @ inputs[3][group].t() + inputs[4][group])
        first += size
    want = torch.cat(parts)
    want_gradients = torch.autograd.grad(want, inputs, grad.double())
    ours = [tensor.detach().to(dtype).to(device).requires_grad_() for tensor in inputs]
    out = fused_feed_forward(ours[0], Weights(*ours[1:]), HiddenLayer(torch.tanh), sizes)
    gradients = torch.autograd.grad(out, ours, grad.to(device))
    # A sum of 16 products of up to 10 is rounded, then goes through a function as steep as 1.
    names = ("out", "rows", "fc1", "bias1", "fc2", "bias2")
    for name, got, wanted in zip(names, (out, *gradients), (want, *want_gradients), strict=True):
        assert_near(got, wanted.detach(), tolerance_of(dtype, 8), name)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_a_gpu_has_them_in_bf16(widths, cuda):
    """Else all the above tests of layers in bf16 would be of another path."""
    before, after = widths
    rows = torch.zeros(5, before, dtype=torch.bfloat16, device=cuda)
    weight = torch.zeros(3, after, before, dtype=torch.bfloat16, device=cuda)
    assert serves(rows, weight)


def test_rows_that_are_not_aligned_are_left_to_a_loop(cuda):
    weight = torch.zeros(3, 8, 12, dtype=torch.bfloat16, device=cuda)
    assert not serves(torch.zeros(5, 12, dtype=torch.bfloat16, device=cuda), weight)


def test_counts_of_groups(device):
    group_C = torch.randint(7, (1000,), generator=torch.Generator().manual_seed(0))
    sizes = GroupSizes(count_groups(group_C.to(device), 9))
    counts = torch.bincount(group_C, minlength=9)
    assert sizes.host == tuple(counts.tolist())
    assert torch.equal(sizes.on(device).cpu(), counts)
    assert torch.equal(sizes.ends(device).cpu(), counts.cumsum(0).int())
    assert torch.equal(GroupSizes(tuple(counts.tolist())).ends(device).cpu(), counts.cumsum(0).int())
