"""Experts by every path against a naive loop over rows: outputs and gradients, threads, dropout, recomputation."""

import multiprocessing
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_hash.moe.experts import GatedFeedForward
from fairseq_hash.moe.kernels import cpu_threads, feed_forward, grouped_mm, padded_mm
from fairseq_hash.moe.kernels.cpu_threads import for_each_group
from fairseq_hash.moe.kernels.feed_forward import WAYS, choose_way, padded_feed_forward
from fairseq_hash.moe.kernels.fused_loop import HiddenLayer, Weights, fused_feed_forward
from fairseq_hash.moe.kernels.group_sizes import GroupSizes, count_groups

WIDTH, HIDDEN = 8, 16
NAMES = ("rows", "fc1", "bias1", "fc2", "bias2")
# float64 on both sides; sums of some tens of products in another order.
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def gated(rows_MH):
    return GatedFeedForward(range(1), WIDTH, HIDDEN, 0.3, 0.0, (0,))._gate(rows_MH)


FUNCTIONS = {"relu": F.relu, "gelu": F.gelu, "gated": gated}


def problem(sizes, function, segments=1, bias=True, dtype=torch.float64):
    """Inputs for as many groups as sizes, `segments` of them to an expert."""
    generator = torch.Generator().manual_seed(len(sizes))
    draw = partial(torch.randn, generator=generator, dtype=dtype)
    groups, before = len(sizes), HIDDEN * (2 if function == "gated" else 1)
    inputs = (
        draw(sum(sizes), WIDTH),
        draw(groups, before, WIDTH),
        draw(groups, before) if bias else None,
        draw(groups // segments, WIDTH, segments * HIDDEN),
        draw(groups, WIDTH) if bias else None,
    )
    return [None if tensor is None else tensor.requires_grad_() for tensor in inputs], draw(sum(sizes), WIDTH)


def naive(inputs, function, sizes, mask_RF=None, dropout=0.0):
    """Row by row."""
    rows, fc1, bias1, fc2, bias2 = inputs
    segments = len(fc1) // len(fc2)
    outputs, row = [], 0
    for group, size in enumerate(sizes):
        second = fc2[group // segments].chunk(segments, dim=1)[group % segments]
        for _ in range(size):
            before = F.linear(rows[row : row + 1], fc1[group], None if bias1 is None else bias1[group])
            hidden = FUNCTIONS[function](before)
            if mask_RF is not None:
                hidden = hidden * mask_RF[row] / (1 - dropout)
            outputs.append(F.linear(hidden, second, None if bias2 is None else bias2[group]))
            row += 1
    return torch.cat(outputs) if outputs else rows * 0


def results(out, inputs, grad):
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    gradients = torch.autograd.grad(out, wanted, grad, allow_unused=True)
    return [out, *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, gradients, strict=True))]


def same(got, want, **tolerance):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.fixture
def on_threads(monkeypatch):
    """Two threads, however little work there is."""
    monkeypatch.setattr(cpu_threads, "LEAST_WORK", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


SIZES = {"mixed": (3, 0, 5, 1, 4, 3), "empty": (0, 0), "one": (7, 0), "even": (2,) * 8, "last empty": (1, 2, 2, 0)}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_fused_equals_naive(sizes, function, recompute, bias, on_threads):
    inputs, grad = problem(sizes, function, bias=bias)
    hidden = HiddenLayer(FUNCTIONS[function], recompute=recompute)
    got = results(fused_feed_forward(inputs[0], Weights(*inputs[1:]), hidden, sizes), inputs, grad)
    same(got, results(naive(inputs, function, sizes), inputs, grad), **EXACT)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=6), st.sampled_from([1, 2, 4]), st.sampled_from(["relu", "gelu"])
)
def test_fused_equals_naive_on_any_sizes_and_segments(sizes, segments, function):
    sizes = tuple(size for size in sizes for _ in range(segments))
    inputs, grad = problem(sizes, function, segments)
    out = fused_feed_forward(inputs[0], Weights(*inputs[1:]), HiddenLayer(FUNCTIONS[function]), sizes)
    same(results(out, inputs, grad), results(naive(inputs, function, sizes), inputs, grad), **EXACT)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_dropout_is_the_mask_scaled(function, recompute, on_threads, monkeypatch):
    """One mask serves forward and backward, and a seed gives one mask whatever the threads do."""
    sizes, masks = (5, 3, 0, 6), []
    draw = HiddenLayer.draw_mask
    monkeypatch.setattr(HiddenLayer, "draw_mask", lambda *args: masks.append(draw(*args)) or masks[-1])
    inputs, grad = problem(sizes, function)
    hidden = HiddenLayer(FUNCTIONS[function], dropout=0.25, recompute=recompute)
    torch.manual_seed(5)
    got = results(fused_feed_forward(inputs[0], Weights(*inputs[1:]), hidden, sizes), inputs, grad)
    (mask_RF,) = masks
    assert mask_RF.dtype == torch.bool and 0.5 < mask_RF.double().mean() < 0.95
    same(got, results(naive(inputs, function, sizes, mask_RF, 0.25), inputs, grad), **EXACT)
    torch.manual_seed(5)
    again = fused_feed_forward(inputs[0], Weights(*inputs[1:]), hidden, sizes)
    assert torch.equal(again, got[0])


@pytest.mark.parametrize("wanted", [("rows",), ("fc1",), ("bias1",), ("fc2",), ("bias2",), ("rows", "fc2")])
@pytest.mark.parametrize("function", ["relu", "gelu"])
def test_only_the_gradients_asked_for(function, wanted):
    sizes = (3, 0, 4)
    inputs, grad = problem(sizes, function)
    for name, tensor in zip(NAMES, inputs, strict=True):
        tensor.requires_grad_(name in wanted)
    hidden = HiddenLayer(FUNCTIONS[function])
    got = results(fused_feed_forward(inputs[0], Weights(*inputs[1:]), hidden, sizes), inputs, grad)
    same(got, results(naive(inputs, function, sizes), inputs, grad), **EXACT)


class Saved:
    """How many elements autograd keeps, weights and rows aside."""

    def __init__(self, inputs):
        self.known = {tensor.data_ptr() for tensor in inputs if tensor is not None}
        self.elements = 0

    def __call__(self, run):
        def pack(tensor):
            self.elements += 0 if tensor.data_ptr() in self.known else tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
        return self.elements


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_kept_for_the_backward_pass(function):
    """One hidden layer; none where it is recomputed; nothing at all in evaluation."""
    sizes = (4, 4)
    inputs, _ = problem(sizes, function)
    run = partial(fused_feed_forward, inputs[0], Weights(*inputs[1:]), sizes=sizes)
    assert Saved(inputs)(lambda: run(hidden=HiddenLayer(FUNCTIONS[function]))) == 8 * inputs[1].shape[1]
    assert Saved(inputs)(lambda: run(hidden=HiddenLayer(FUNCTIONS[function], recompute=True))) == 0
    with torch.no_grad():
        assert Saved(inputs)(lambda: run(hidden=HiddenLayer(FUNCTIONS[function]))) == 0
        assert run(hidden=HiddenLayer(FUNCTIONS[function])).grad_fn is None
    with torch.inference_mode():
        assert run(hidden=HiddenLayer(FUNCTIONS[function])).is_inference()


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", ["grouped", "padded"])
def test_ways_of_a_gpu_equal_fused(way, function, recompute, bias, segments):
    """Here in fp32 on the CPU: sums of some tens of products, in another order."""
    if function == "gated" and segments > 1:
        pytest.skip("gated experts have no segments")
    sizes = (5, 5, 0, 0, 8, 8)
    inputs, grad = problem(sizes, function, segments, bias, torch.float32)
    weights, hidden = Weights(*inputs[1:]), HiddenLayer(FUNCTIONS[function], recompute=recompute)
    got = results(WAYS[way](inputs[0], weights, hidden, GroupSizes(sizes)), inputs, grad)
    want = results(WAYS["loop"](inputs[0], weights, hidden, GroupSizes(sizes)), inputs, grad)
    same(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("product", [0, 2, 256])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_padded_equals_naive(sizes, function, bias, product, monkeypatch):
    monkeypatch.setattr(padded_mm, "PRODUCT", product)
    inputs, grad = problem(sizes, function, bias=bias)
    hidden = HiddenLayer(FUNCTIONS[function])
    got = results(padded_feed_forward(inputs[0], Weights(*inputs[1:]), hidden, GroupSizes(sizes)), inputs, grad)
    same(got, results(naive(inputs, function, sizes), inputs, grad), **EXACT)


@pytest.mark.parametrize(("product", "rows"), [(0, 1), (1, 2), (3, 2), (100, 9)])
def test_rows_of_the_batch(product, rows, monkeypatch):
    monkeypatch.setattr(padded_mm, "PRODUCT", product)
    assert padded_mm.batch_rows((2, 1, 9, 2)) == rows
    assert padded_mm.batch_rows(()) == padded_mm.batch_rows((0, 0)) == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", ["grouped", "padded"])
def test_a_gradient_that_is_one_number_for_all(way, bias):
    """The gradient of a sum is expanded: it has no rows in memory, which a grouped product wants."""
    sizes = (5, 0, 8, 8)
    inputs, _ = problem(sizes, "gelu", 1, bias, torch.float32)
    weights, grad = Weights(*inputs[1:]), torch.ones(1, 1).expand(sum(sizes), WIDTH)
    outs = (WAYS[name](inputs[0], weights, HiddenLayer(F.gelu), GroupSizes(sizes)) for name in (way, "loop"))
    got, want = (results(out, inputs, grad) for out in outs)
    same(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("way", ["grouped", "padded"])
def test_dropout_of_ways_of_a_gpu(way, recompute):
    """The backward pass has the mask of the forward pass: y is linear in the second map's weight."""
    sizes = GroupSizes((5, 3, 0, 6))
    inputs, grad = problem(sizes.host, "gelu", bias=False, dtype=torch.float32)
    torch.manual_seed(5)
    hidden = HiddenLayer(F.gelu, dropout=0.25, recompute=recompute)
    out, _, _, grad_fc2 = results(WAYS[way](inputs[0], Weights(*inputs[1:]), hidden, sizes), inputs, grad)
    torch.testing.assert_close((out * grad).sum(), (inputs[3] * grad_fc2).sum(), rtol=1e-4, atol=1e-4)
    without = WAYS[way](inputs[0], Weights(*inputs[1:]), HiddenLayer(F.gelu), sizes)
    assert (out - without).abs().max() > 0.1


def test_grouped_products_are_tried_before_use(monkeypatch, caplog):
    """A kernel that forgets empty groups is noticed, and is not used."""
    device, right = torch.device("cpu"), F.grouped_mm
    grouped_mm._is_right.cache_clear()
    assert grouped_mm._is_right(device, torch.bfloat16)
    for wrong in (lambda *args, **kwargs: right(*args, **kwargs) * 1.1, _refuse):
        grouped_mm._is_right.cache_clear()
        monkeypatch.setattr(F, "grouped_mm", wrong)
        assert not grouped_mm._is_right(device, torch.bfloat16)
    assert "grouped_mm is wrong on cpu" in caplog.text and "there is no grouped_mm on cpu: no kernel" in caplog.text
    grouped_mm._is_right.cache_clear()


def _refuse(*args, **kwargs):
    raise RuntimeError("no kernel")


class OnGpu(torch.Tensor):
    is_cuda = True


def test_the_way_is_chosen_by_device_dtype_and_shape(monkeypatch):
    monkeypatch.setattr(grouped_mm, "_is_right", lambda *_: True)

    def way(rows, width=16):
        return choose_way(rows, Weights(torch.randn(2, width, 8), None, torch.randn(2, 8, width), None))

    for dtype, served_by in feed_forward.GPU_WAYS.items():
        rows = torch.randn(3, 8, dtype=dtype)
        assert way(rows) == "loop"
        assert way(rows.as_subclass(OnGpu)) == served_by
    assert feed_forward.GPU_WAYS[torch.bfloat16] == "grouped"
    assert way(torch.randn(3, 8).bfloat16().as_subclass(OnGpu), width=12) == "loop"
    assert way(torch.randn(3, 8).double().as_subclass(OnGpu)) == "loop"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_double(dtype):
    """Each of some five roundings on the way is off by at most 2^-9 (2^-12) of its value.

    Not ReLU: its gradient jumps where a rounding takes a value over zero.
    """
    sizes = (9, 0, 30, 2)
    inputs, grad = problem(sizes, "gelu")
    half = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    run = [fused_feed_forward(i[0], Weights(*i[1:]), HiddenLayer(F.gelu), sizes) for i in (half, inputs)]
    for got, want in zip(results(run[0], half, grad.to(dtype)), results(run[1], inputs, grad), strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= 0.02 * want.abs().max()


def test_autocast_makes_half_precision():
    sizes = (9, 0, 30)
    inputs, _ = problem(sizes, "relu", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = feed_forward.feed_forward(inputs[0], Weights(*inputs[1:]), HiddenLayer(F.relu), GroupSizes(sizes))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in inputs)


class TestThreads:
    def test_every_group_is_served_once_on_all_threads(self, on_threads):
        """Both threads are in a job at the same time, each with torch on one thread and without autograd."""
        sizes, served, meeting = (3, 0, 2, 3), [], threading.Barrier(2, timeout=30)

        def job(group, first, end):
            meeting.wait()
            served.append((group, first, end, torch.get_num_threads(), torch.is_grad_enabled()))
            meeting.wait()

        for_each_group(job, (*sizes, 0, 2), 1, on_cpu=True)
        assert sorted(served) == [(0, 0, 3, 1, False), (2, 3, 5, 1, False), (3, 5, 8, 1, False), (5, 8, 10, 1, False)]

    def test_the_same_bits_each_time(self, on_threads):
        """Which thread serves which group is chance; a product on two threads differs from one on one thread."""
        sizes = (5,) * 12
        inputs, grad = problem(sizes, "gated")
        run = partial(fused_feed_forward, inputs[0], Weights(*inputs[1:]), HiddenLayer(gated), sizes)
        first, *others = (results(run(), inputs, grad) for _ in range(20))
        for again in others:
            same(again, first, rtol=0, atol=0)

    @pytest.mark.parametrize("sizes", [(20, 1, 1), (5,), (0, 0), ()])
    def test_uneven_work_is_not_shared_out(self, sizes, on_threads):
        threads = []
        for_each_group(lambda *_: threads.append(torch.get_num_threads()), sizes, 1, on_cpu=True)
        assert threads == [2] * sum(size > 0 for size in sizes)

    def test_an_error_in_any_thread_is_raised(self, on_threads):
        def job(group, first, end):
            if threading.current_thread() is not threading.main_thread() or group > 5:
                raise ValueError("broken")

        with pytest.raises(ValueError, match="broken"):
            for_each_group(job, (1,) * 8, 1, on_cpu=True)

    def test_a_forked_process_has_threads_of_its_own(self, on_threads):
        for_each_group(lambda *_: None, (1,) * 8, 1, on_cpu=True)
        given = (lambda *_: None, (1,) * 8, 1, True)
        process = multiprocessing.get_context("fork").Process(target=for_each_group, args=given)
        process.start()
        process.join(30)
        assert process.exitcode == 0


@given(st.lists(st.integers(0, 4), max_size=30))
def test_group_sizes(group_C):
    count_G = count_groups(torch.tensor(group_C, dtype=torch.int64), 5)
    assert count_G.tolist() == [group_C.count(group) for group in range(5)]
    for sizes in (GroupSizes(count_G), GroupSizes(tuple(count_G.tolist()))):
        assert sizes.host == tuple(count_G.tolist())
        assert torch.equal(sizes.on(torch.device("cpu")), count_G)
        ends = sizes.ends(torch.device("cpu"))
        assert ends.dtype == torch.int32 and ends.tolist() == count_G.cumsum(0).tolist()
