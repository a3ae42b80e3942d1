"""What `half_precision` does for all tensors at once is what fairseq does one by one, to the bit on a CPU."""

import pytest
import recorded
import torch
from fairseq import utils
from fairseq.optim import FairseqOptimizer, FP16Optimizer
from fairseq.optim.fp16_optimizer import _FP16OptimizerMixin
from plugin import build
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_hash.training.fused_adam import FusedAdam

REPLACED = (
    (_FP16OptimizerMixin, "zero_grad"),
    (_FP16OptimizerMixin, "_sync_fp16_grads_to_fp32"),
    (_FP16OptimizerMixin, "_sync_fp32_params_to_fp16"),
    (FairseqOptimizer, "multiply_grads"),
    (utils, "clip_grad_norm_"),
)
FORMS = {
    "fp32": (),
    "bf16": ("--bf16",),
    "memory-efficient bf16": ("--memory-efficient-bf16",),
    "fp16": ("--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", "4"),
}
MODELS = {"hash": ("--router", "hash", "--num-experts", "4", "--sparse-layers", "0,1"), "dense": ()}
UPDATES = 6


def as_upstream(patch):
    """Take our functions away."""
    for owner, name in REPLACED:
        patch.setattr(owner, name, getattr(owner, name).__wrapped__)
    patch.setattr(utils, "multi_tensor_l2norm_available", False)


def trained(data, *words):
    fixed = ("--dropout", "0", "--max-tokens", "64", "--clip-norm", "0.05", "--update-freq", "2")
    return recorded.train(data, (*fixed, *words), UPDATES)


def assert_same(ours, theirs, **close):
    for what in ("loss", "norm", "validation", "parameters"):
        torch.testing.assert_close(ours[what], theirs[what], **close)


@pytest.mark.parametrize("optimizer", ["adam", "fused_adam"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("form", FORMS)
def test_trainings_are_those_of_fairseq(data, monkeypatch, form, model, optimizer):
    words = (*FORMS[form], *MODELS[model], "--optimizer", optimizer)
    ours = trained(data, *words)
    assert max(ours["norm"]) > 0.05  # something was clipped
    with monkeypatch.context() as patch:
        as_upstream(patch)
        assert_same(ours, trained(data, *words), rtol=0, atol=0)
    if optimizer == "fused_adam":  # that the kernel divides by the scale is a rounding more or less
        monkeypatch.setattr(FusedAdam, "supports_step_with_scale", False)
        exact = form in ("fp32", "bf16")
        assert_same(ours, trained(data, *words), rtol=1e-2, atol=1e-4 if exact else 1e-2)


def half(data, *words, shapes=((3, 4), (5,), (2, 2))):
    """Return fairseq's optimizer of some bf16 parameters."""
    cfg, *_ = build(data, "--bf16", "--lr", "0.1", "--weight-decay", "0.1", "--optimizer", "fused_adam", *words)
    torch.manual_seed(1)
    optimizer = FP16Optimizer.build_optimizer(cfg, [torch.nn.Parameter(torch.randn(s).bfloat16()) for s in shapes])
    optimizer.zero_grad()
    return optimizer


def backward(optimizer, number, leave_out=()):
    generator = torch.Generator().manual_seed(number)
    losses = [
        (parameter * torch.randn(parameter.shape, generator=generator)).sum()
        for place, parameter in enumerate(optimizer.fp16_params)
        if place not in leave_out and parameter.requires_grad
    ]
    optimizer.backward(sum(losses))


def states(data):
    """Make updates with unused, frozen and no parameters at all; yield what there is after each."""
    optimizer = half(data)
    for number, leave_out in enumerate([(), (1,), None, (0, 2), ()]):
        optimizer.zero_grad()
        if number == 3:
            optimizer.fp16_params[2].requires_grad = False
        if leave_out is not None:
            backward(optimizer, number, leave_out)
            backward(optimizer, number + 10, leave_out)
        optimizer.multiply_grads(0.25)
        norm = optimizer.clip_grad_norm(0.5)
        gradients = [parameter.grad.clone() for parameter in optimizer.fp32_params]
        optimizer.step()
        values = [parameter.detach().clone() for parameter in (*optimizer.fp16_params, *optimizer.fp32_params)]
        yield norm, gradients, values


def test_what_has_no_gradient_is_zero_as_in_fairseq(data, monkeypatch):
    ours = list(states(data))
    as_upstream(monkeypatch)
    for mine, theirs in zip(ours, states(data), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert float(ours[2][0]) == 0 and not any(gradient.any() for gradient in ours[2][1])


def test_a_factor_is_of_one_update(data):
    """Where the optimizer divides by the scale, fairseq in bf16 leaves the factor to the next update."""
    optimizer = half(data)
    for number in range(3):
        optimizer.zero_grad()
        backward(optimizer, number)
        expected = torch.cat([parameter.grad.flatten() for parameter in optimizer.fp16_params]).float().norm()
        optimizer.multiply_grads(0.25)
        torch.testing.assert_close(optimizer.clip_grad_norm(0.5), 0.25 * expected)
        optimizer.step()


def norms_of(gradients, max_norm):
    parameters = [torch.nn.Parameter(torch.zeros(g.shape, dtype=g.dtype)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    parameters[-1].expert = True
    norm = utils.clip_grad_norm_(parameters, max_norm, lambda dense: 2 * dense)
    return norm, [parameter.grad for parameter in parameters]


@pytest.mark.parametrize("max_norm", [0, 0.5, 1e3])
def test_norms_of_mixed_gradients(monkeypatch, max_norm):
    torch.manual_seed(0)
    gradients = [torch.randn(4, 5), torch.randn(7).bfloat16(), torch.zeros(0, 3)]
    gradients += [torch.randn(6, 5).t(), torch.randn(7).half(), torch.randn(9)]
    ours = norms_of(gradients, max_norm)
    as_upstream(monkeypatch)
    torch.testing.assert_close(ours, norms_of(gradients, max_norm), rtol=0, atol=0)


class Calls(TorchDispatchMode):
    """Count what torch is asked for, but `detach`, which touches no memory."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is not torch.ops.aten.detach.default
        return function(*args, **kwargs or {})


def calls(data, tensors):
    """Return the calls of an update after its backward pass, its moments being there."""
    optimizer = half(data, shapes=[(3,)] * tensors)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(sum(parameter.sum() for parameter in optimizer.fp16_params))
        with Calls() as counted:
            optimizer.multiply_grads(torch.tensor(0.25))
            optimizer.clip_grad_norm(0.5)
            optimizer.step()
    return counted.count


def test_calls_do_not_grow_with_the_number_of_parameters(data):
    few, many = calls(data, 5), calls(data, 130)
    assert few == many < 30
