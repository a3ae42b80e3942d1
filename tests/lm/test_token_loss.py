"""The cross-entropy over chunks of rows: value, gradient, memory, and that it waits for nothing."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fairseq import utils
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from made_tensors import LargeTensors
from plugin import build, evaluate, records, train
from torch import nn

from fairseq_hash.core.errors import UserError
from fairseq_hash.fairseq_patches.objective import check_data_parallel
from fairseq_hash.lm import criterion as criteria
from fairseq_hash.lm import token_loss
from fairseq_hash.lm.token_loss import adaptive_cross_entropy, token_cross_entropy

IGNORE = 1
# Rounding of the result: fp32 computes losses of some nats, and the gradient is rounded to the logits' type.
LOSS = {"rtol": 2e-6, "atol": 2e-6}
GRADIENT = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture(params=[1, 20, 2**20], ids=lambda size: f"chunk{size}")
def chunk(request, monkeypatch):
    """Chunks of a row a thread, of a few rows, and one of all rows."""
    monkeypatch.setattr(token_loss, "THREAD_CHUNK", request.param)


def case(tokens, vocabulary, dtype=torch.float32, seed=0):
    """Logits `[N, V]` and targets `[N]`, about every fourth of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = (4 * torch.randn(tokens, vocabulary, generator=generator)).to(dtype)
    target_N = torch.randint(vocabulary, (tokens,), generator=generator)
    target_N[::4] = IGNORE
    return logits_NV, target_N


def with_gradient(function, logits_NV, grad):
    """The loss, and the gradient of the logits for this gradient of the loss."""
    logits_NV = logits_NV.detach().requires_grad_()
    loss = function(logits_NV)
    return loss.detach(), torch.autograd.grad(loss, logits_NV, grad.to(loss.dtype))[0]


def fairseqs(logits_NV, target_N, reduce=True):
    """As `CrossEntropyCriterion` and a decoder's `get_normalized_probs` have it."""
    reduction = "sum" if reduce else "none"
    return F.nll_loss(utils.log_softmax(logits_NV, dim=-1), target_N, ignore_index=IGNORE, reduction=reduction)


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("dtype", list(GRADIENT))
@pytest.mark.parametrize(("tokens", "vocabulary"), [(0, 7), (1, 7), (9, 1), (23, 7), (40, 3)])
def test_equals_torchs_in_float64(chunk, tokens, vocabulary, dtype, reduce):
    logits_NV, target_N = case(tokens, vocabulary, dtype)
    grad = torch.tensor(-1.5) if reduce else torch.linspace(-2, 3, tokens)
    loss, gradient_NV = with_gradient(lambda x: token_cross_entropy(x, target_N, IGNORE, reduce), logits_NV, grad)
    reduction = "sum" if reduce else "none"
    want, want_NV = with_gradient(
        lambda x: F.cross_entropy(x, target_N, ignore_index=IGNORE, reduction=reduction), logits_NV.double(), grad
    )
    assert loss.dtype == torch.float32 and loss.shape == want.shape
    assert gradient_NV.dtype == dtype and gradient_NV.shape == logits_NV.shape
    torch.testing.assert_close(loss.double(), want, **LOSS)
    # Of float16 the smallest numbers, too, are 2^-24 apart.
    torch.testing.assert_close(gradient_NV.double(), want_NV, rtol=GRADIENT[dtype], atol=2e-6)


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("dtype", list(GRADIENT))
def test_loss_and_gradient_are_fairseqs_to_the_last_bit(chunk, dtype, reduce):
    """The log of a training goes on as it was, and a model without experts trains as fairseq's own does."""
    logits_NV, target_N = case(500, 37, dtype)
    grad = torch.full(() if reduce else (500,), 0.37)
    ours, theirs = (
        with_gradient(lambda x, f=function: f(x, target_N, reduce=reduce), logits_NV, grad)
        for function in (partial(token_cross_entropy, ignore_index=IGNORE), fairseqs)
    )
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_all_ignored(chunk):
    logits_NV, target_N = case(9, 7)
    target_N.fill_(IGNORE)
    loss, gradient_NV = with_gradient(lambda x: token_cross_entropy(x, target_N, IGNORE), logits_NV, torch.ones(()))
    assert loss == 0 and not gradient_NV.any()


def test_an_ignored_index_outside_the_vocabulary(chunk):
    logits_NV, target_N = case(9, 7)
    expected = token_cross_entropy(logits_NV, target_N, IGNORE)
    for outside in (-100, 7):
        moved_N = target_N.masked_fill(target_N == IGNORE, outside)
        assert torch.equal(token_cross_entropy(logits_NV, moved_N, outside), expected)


def test_a_target_outside_the_vocabulary_is_an_error(chunk):
    logits_NV, target_N = case(9, 7)
    target_N[3] = 7
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        token_cross_entropy(logits_NV, target_N, IGNORE)


@pytest.mark.parametrize(
    "view", [lambda x: x.t().contiguous().t(), lambda x: x.repeat(1, 2)[:, ::2], lambda x: x[:1].expand(23, 7)]
)
def test_logits_that_are_not_contiguous(chunk, view):
    logits_NV, target_N = case(23, 7)
    logits_NV = view(logits_NV)
    assert not logits_NV.is_contiguous()
    results = [
        with_gradient(lambda x: token_cross_entropy(x, target_N, IGNORE), given_NV, torch.tensor(2.0))
        for given_NV in (logits_NV, logits_NV.contiguous())
    ]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_gradcheck(chunk):
    logits_NV, target_N = case(6, 5, torch.float64)
    logits_NV.requires_grad_()
    for reduce in (True, False):
        assert torch.autograd.gradcheck(lambda x, r=reduce: token_cross_entropy(x, target_N, IGNORE, r), logits_NV)


def test_float16_keeps_small_probabilities_for_the_loss_scale(chunk):
    logits_NV, target_N = torch.tensor([[0.0, -20.0, 3.0]], dtype=torch.float16), torch.tensor([2])
    scale = torch.tensor(2.0**12)  # 1e-10 is no number of float16, 4e-7 is
    _, gradient_NV = with_gradient(lambda x: token_cross_entropy(x, target_N, IGNORE), logits_NV, scale)
    want, want_NV = with_gradient(lambda x: fairseqs(x, target_N), logits_NV, scale)
    assert gradient_NV[0, 1] > 0
    torch.testing.assert_close(gradient_NV, want_NV, rtol=2**-10, atol=0)


@pytest.mark.parametrize("dtype", list(GRADIENT))
def test_numbers_that_are_not_finite_show_as_in_fairseq(chunk, dtype):
    """An overflow has to reach the loss scaler and the check for NaN."""
    inf, nan = float("inf"), float("nan")
    rows = [[0, inf, 0], [0, 0, inf], [0, nan, 0], [0, -inf, 0], [0, 0, -inf], [-inf] * 3, [0, 0, 0]]
    logits_NV, target_N = torch.tensor(rows, dtype=dtype), torch.full((len(rows),), 2)
    for ignored in (False, True):
        target_N = torch.full((len(rows),), IGNORE if ignored else 2)
        got, want = (
            with_gradient(function, logits_NV, torch.ones(len(rows)))
            for function in (
                lambda x, t=target_N: token_cross_entropy(x, t, IGNORE, reduce=False),
                lambda x, t=target_N: fairseqs(x, t, reduce=False),
            )
        )
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", list(GRADIENT))
def test_nothing_as_large_as_the_logits_but_the_gradient(monkeypatch, dtype):
    monkeypatch.setattr(token_loss, "THREAD_CHUNK", 70)
    logits_NV, target_N = case(300, 7, dtype)
    with torch.no_grad(), LargeTensors(300 * 7) as mode:
        token_cross_entropy(logits_NV, target_N, IGNORE)
    assert mode.dtypes == []
    logits_NV.requires_grad_()
    with LargeTensors(300 * 7) as mode:
        loss = token_cross_entropy(logits_NV, target_N, IGNORE)
        assert mode.dtypes == []
        loss.backward()
    assert mode.dtypes == [dtype]
    with LargeTensors(300 * 7) as mode:
        fairseqs(logits_NV, target_N).backward()
    assert len(mode.dtypes) > 1  # the mode sees what fairseq's way makes


@pytest.mark.parametrize("size", [1, 50, 2**26])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_waits_for_nothing(monkeypatch, dtype, size):
    """On the device `meta` there are no values that the host could ask for."""
    monkeypatch.setattr(token_loss, "DEVICE_CHUNK", size)
    logits_NV = torch.empty(23, 7, dtype=dtype, device="meta", requires_grad=True)
    target_N = torch.empty(23, dtype=torch.int64, device="meta")
    for reduce, shape in ((True, ()), (False, (23,))):
        loss = token_cross_entropy(logits_NV, target_N, IGNORE, reduce)
        assert loss.shape == shape and loss.dtype == torch.float32
        (gradient_NV,) = torch.autograd.grad(loss, logits_NV, torch.ones_like(loss))
        assert gradient_NV.shape == logits_NV.shape and gradient_NV.dtype == dtype


def sample_of(task):
    """Two sequences, the second of them shorter."""
    token_BL = torch.randint(4, len(task.source_dictionary), (2, 12), generator=torch.Generator().manual_seed(0))
    token_BL[1, 9:] = task.source_dictionary.pad()
    net_input = {"src_tokens": token_BL, "src_lengths": torch.tensor([12, 9])}
    return {"net_input": net_input, "target": token_BL.clone(), "ntokens": 21}


@pytest.mark.parametrize("autocast", [False, True])
def test_in_the_criterion(data, monkeypatch, autocast):
    """The same loss and gradients as fairseq's criterion, by this function."""
    _, task, model, criterion = build(data, "--router", "hash", "--sparse-layers", "0")
    calls = []
    monkeypatch.setattr(
        criteria, "token_cross_entropy", lambda *args, **kwargs: calls.append(1) or token_cross_entropy(*args, **kwargs)
    )
    results = []
    for loss_of in (criterion, CrossEntropyCriterion(task, sentence_avg=False)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, sample_of(task))[0]
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(calls) == 1
    torch.testing.assert_close(*results, rtol=2e-2 if autocast else 1e-5, atol=1e-2 if autocast else 1e-6)
    assert torch.equal(results[0][0], results[1][0])


def test_other_log_probabilities_are_left_to_fairseq(data, monkeypatch):
    """An adaptive softmax, a model with probabilities of its own, and outputs that are no logits."""
    _, task, model, criterion = build(data)
    net_output = model(**sample_of(task)["net_input"])
    assert criteria.has_plain_logits(model, net_output)
    wrapped = type("Wrapper", (nn.Module,), {"__getattr__": lambda self, name: getattr(model, name)})()
    assert criteria.has_plain_logits(wrapped, net_output)
    assert not criteria.has_plain_logits(model, ([net_output[0]], None))
    assert not criteria.has_plain_logits(nn.Linear(1, 1), net_output)
    own = type("Own", (type(model),), {"get_normalized_probs": lambda self, *args, **kwargs: None})
    monkeypatch.setattr(model, "__class__", own)
    assert not criteria.has_plain_logits(model, net_output)


def adaptive_by_hand(softmax, feature_ND, target_N):
    """The definition, word by word, out of fairseq's matrices: the cluster's probability times the word's in it."""
    first, losses = softmax.cutoff[0], []
    for feature_D, target in zip(feature_ND, target_N.tolist(), strict=True):
        head = softmax.head(feature_D[None])[0].log_softmax(0)
        if target == IGNORE:
            losses.append(head.new_zeros(()))
        elif target < first:
            losses.append(-head[target])
        else:
            cluster = next(n for n, end in enumerate(softmax.cutoff[1:]) if target < end)
            tail = softmax.tail[cluster](feature_D[None])[0].log_softmax(0)
            losses.append(-head[first + cluster] - tail[target - softmax.cutoff[cluster]])
    return torch.stack(losses)


ADAPTIVE = ("--adaptive-softmax-cutoff", "6,18", "--router", "hash,switch", "--sparse-layers", "0,1")
ADAPTIVE += ("--num-experts", "4", "--no-decoder-final-norm")


@pytest.mark.parametrize(
    "which", ["all clusters", "frequent words only", "second words of clusters, which fairseq drops"]
)
def test_an_adaptive_softmax(data, which):
    """Losses and every gradient are those of the definition; a sum is that of the tokens'."""
    _, task, model, _ = build(data, *ADAPTIVE)
    softmax = model.decoder.adaptive_softmax
    generator = torch.Generator().manual_seed(3)
    feature_ND = torch.randn(40, 16, generator=generator)
    last = {"all clusters": len(task.source_dictionary), "frequent words only": 6}.get(which)
    target_N = torch.tensor([7, 19] * 20) if last is None else torch.randint(last, (40,), generator=generator)
    target_N[::4] = IGNORE
    results = []
    for loss in (adaptive_by_hand, lambda *args: adaptive_cross_entropy(*args, IGNORE, reduce=False)):
        x_ND = feature_ND.clone().requires_grad_()
        softmax.zero_grad()
        loss_N = loss(softmax, x_ND, target_N)
        loss_N.sum().backward()
        results.append((loss_N.detach(), x_ND.grad, *(p.grad for p in softmax.parameters() if p.grad is not None)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    total = adaptive_cross_entropy(softmax, feature_ND, target_N, IGNORE)
    torch.testing.assert_close(total, results[0][0].sum(), rtol=1e-6, atol=0)


def test_the_criterion_with_an_adaptive_softmax(data):
    """The cross-entropy that fairseq gets from all log-probabilities; every parameter has a gradient."""
    _, task, model, criterion = build(data, *ADAPTIVE)
    sample, theirs = sample_of(task), CrossEntropyCriterion(task, sentence_avg=False)
    with torch.no_grad():
        model.eval()
        criterion.eval()  # without the switch router's loss
        torch.testing.assert_close(criterion(model, sample)[0], theirs(model, sample)[0], rtol=1e-5, atol=0)
    model.train()
    criterion.train()
    criterion(model, sample)[0].backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".experts." not in name)


def test_an_adaptive_softmax_trains_and_evaluates(data, tmp_path):
    """By the commands; data parallelism that waits for gradients which no word of a batch gives is refused."""
    done = train(data, tmp_path, *ADAPTIVE, "--max-update", "2")
    trained = float(records(done, "valid")[-1]["valid_loss"])
    done = evaluate(data, tmp_path / "checkpoint_last.pt")
    found = float(re.search(r"Loss \(base 2\): ([\d.]+)", done.stdout + done.stderr)[1])
    assert found == pytest.approx(trained, abs=2e-3)
    _, _, model, _ = build(data, *ADAPTIVE)
    several = {"distributed_world_size": 2, "find_unused_parameters": False}
    with pytest.raises(UserError, match="--adaptive-softmax-cutoff with --ddp-backend pytorch_ddp waits"):
        check_data_parallel(SimpleNamespace(ddp_backend="pytorch_ddp", **several), model)
    check_data_parallel(SimpleNamespace(ddp_backend="legacy_ddp", **several), model)
