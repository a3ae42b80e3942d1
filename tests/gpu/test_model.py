"""The tiny model on a device: routes, recomputation, decoding step by step, padding, and where the host waits."""

import copy
import functools

import pytest
import torch
from plugin import build

from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.routing_context import RoutingContext
from fairseq_hash.moe.routing_stats import RoutingReport
from gpu import waits
from gpu.layers import FP32, assert_near

SPARSE = ("--sparse-layers", "0,1", "--num-experts", "4")
HASH = (*SPARSE, "--router", "hash")
TOPK = (*SPARSE, "--router", "topk", "--router-score", "sigmoid")
MEMORY = ("--memory-layers", "1", "--memory-rows", "64", "--memory-heads", "2", "--memory-width", "8")
K2 = ("--experts-per-token", "2", "--hash-table", "random")
LEARNED = (*K2, "--hash-weights", "learned", "--hash-score", "sqrt-softplus", "--hash-scale", "1.5")
VARIANTS = {
    "token": (),
    "bigram": ("--hash-feature", "bigram", "--hash-buckets", "97", "--hash-table", "random"),
    "history": ("--hash-feature", "history", "--hash-length", "2", "--hash-table", "random"),
    "position": ("--hash-feature", "position", "--hash-table", "random"),
    "uniform": K2,
    "learned": LEARNED,
    "multi-hash": ("--multi-hash", "4", "--hash-table", "random"),
    "shared, gated": ("--shared-expert", "--expert-form", "swiglu", "--swiglu-limit", "1", *K2),
    "inserted": ("--sparse-placement", "insert", "--expert-sublayers", "2"),
    "recomputed": ("--recompute-hidden",),
    "per layer": ("--hash-per-layer", "--hash-table", "random"),
}
HASHED = {name: (*HASH, *options) for name, options in VARIANTS.items()}
ALL = {
    **HASHED,
    "switch": (*SPARSE, "--router", "switch", "--capacity-factor", "1"),
    "base": (*SPARSE, "--router", "base"),
    "base, inserted": (*SPARSE, "--router", "base", "--sparse-placement", "insert"),
    "gshard": (*SPARSE, "--router", "gshard", "--second-expert-policy", "all", "--capacity-factor", "1"),
    "sinkhorn": (*SPARSE, "--router", "sinkhorn"),
    "random-linear": (*SPARSE, "--router", "random-linear"),
    "stablemoe": (*SPARSE, "--router", "stablemoe", "--stable-updates", "5"),
    "top-2 by bias": (*TOPK, "--balancing", "bias", "--experts-per-token", "2", "--normalize-weights"),
    "top-k by loss": (*SPARSE, "--router", "topk", "--balancing", "loss"),
    "top-k by quantile": (*TOPK, "--balancing", "quantile"),
    "memory": MEMORY,
    "hash and memory": (*HASH, *MEMORY),
}
CHAOTIC = ("base", "sinkhorn")  # in training, rounding may change a whole assignment


def model_of(data, *arguments):
    """Return the dictionary, a model on the CPU, the same each time, and the criterion; no learned weight is zero."""
    dictionary, model, criterion = _model_of(data, arguments)
    return dictionary, copy.deepcopy(model), criterion


@functools.cache
def _model_of(data, arguments):
    torch.manual_seed(1)
    _, task, model, criterion = build(data, *arguments)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".sparse." in name and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return task.source_dictionary, model, criterion


def tokens_of(dictionary, padded=False, rows=3, length=16):
    token_BL = torch.randint(4, len(dictionary), (rows, length), generator=torch.Generator().manual_seed(0))
    if padded:
        token_BL[1, 9:] = dictionary.pad()
    return token_BL


def step(model, criterion, token_BL, padding):
    """Return loss and gradients of one batch."""
    model.zero_grad()
    net_input = {"src_tokens": token_BL, "src_lengths": (token_BL != padding).sum(dim=1)}
    loss, _, _ = criterion(model, {"net_input": net_input, "target": token_BL.roll(-1, 1), "ntokens": token_BL.numel()})
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, want, tolerance):
    assert got.keys() == want.keys()
    largest = max(gradient.abs().max().item() for gradient in want.values())
    for name, gradient in want.items():
        if name.endswith("k_proj.bias"):  # zero but for rounding: softmax does not change where all scores do alike
            assert max(got[name].abs().max(), gradient.abs().max()) < FP32 * largest
        else:
            assert_near(got[name], gradient.cpu().double(), tolerance, name)


@pytest.mark.parametrize("variant", HASHED)
def test_routes_are_those_of_the_cpu(variant, data, device):
    """Beside padding, and step by step."""
    dictionary, model, _ = model_of(data, *HASHED[variant])
    token_BL = tokens_of(dictionary, padded=True)
    on_device = copy.deepcopy(model).to(device)
    for tokens, is_step in [(token_BL, False), *((token_BL[:, :length], True) for length in (1, 2, 9, 16))]:
        want = model.decoder.routing_context(tokens, is_step)
        got = on_device.decoder.routing_context(tokens.to(device), is_step)
        assert len(want.hash_routes) == len(got.hash_routes) > 0
        for ours, theirs in zip(got.hash_routes, want.hash_routes, strict=True):
            assert torch.equal(ours.assignment.expert_TK.cpu(), theirs.assignment.expert_TK)
            assert torch.equal(ours.plan.choice_R.cpu(), theirs.plan.choice_R)
            assert ours.plan.rows_per_expert == theirs.plan.rows_per_expert


@pytest.mark.parametrize("variant", ALL)
def test_loss_and_gradients_are_those_of_the_cpu(variant, data, device):
    """In fp32; two layers, attention and the softmax over the vocabulary: some hundred sums in another order."""
    assert torch.backends.cuda.matmul.allow_tf32 is False
    dictionary, model, criterion = model_of(data, *ALL[variant])
    model.train(not variant.startswith(CHAOTIC))
    token_BL = tokens_of(dictionary, padded=True)
    want_loss, want = step(model, criterion, token_BL, dictionary.pad())
    on_device = copy.deepcopy(model).to(device)
    loss, got = step(on_device, criterion.to(device), token_BL.to(device), dictionary.pad())
    assert_near(loss, want_loss.double(), FP32, "loss")
    assert_same_gradients(got, want, 10 * FP32)


@pytest.mark.parametrize(
    "variant", ["token", "learned", "multi-hash", "shared, gated", "inserted", "recomputed", "switch", "base"]
)
def test_activation_checkpointing_changes_nothing(variant, data, device):
    """In fp32, with dropout, jitter and a capacity where there are any."""
    found = []
    for extra in ((), ("--checkpoint-activations",)):
        options = ("--dropout", "0.1", "--expert-dropout", "0.1")
        options += ("--router-jitter", "0.1") if variant == "switch" else ()
        dictionary, model, criterion = model_of(data, *ALL[variant], *options, *extra)
        model.to(device)
        torch.manual_seed(3)
        found.append(step(model, criterion.to(device), tokens_of(dictionary, True).to(device), dictionary.pad()))
    (loss, gradients), (loss_again, gradients_again) = found
    assert loss_again == loss and gradients_again.keys() == gradients.keys()
    assert_same_gradients(gradients_again, gradients, FP32)


@pytest.mark.parametrize("variant", ALL)
def test_decoding_step_by_step_gives_the_logits_of_the_full_pass(variant, data, device):
    dictionary, model, _ = model_of(data, *ALL[variant])
    model.to(device).eval()
    for layer in model.modules():
        if isinstance(layer, SparseLayer):
            layer.eval_capacity_factor = 0.0  # a step has a capacity of its own
    token_BL = tokens_of(dictionary).to(device)
    with torch.no_grad():
        full, _ = model(token_BL)
        state = {}
        steps = [model.decoder(token_BL[:, : n + 1], incremental_state=state)[0] for n in range(token_BL.shape[1])]
    assert_near(torch.cat(steps, dim=1), full.cpu().double(), 10 * FP32, "logits")


@pytest.mark.parametrize("variant", HASHED)
def test_padding_is_never_routed_or_counted(variant, data, device):
    """Behind a sequence, and before it: the logits are those of the sequence alone."""
    dictionary, model, _ = model_of(data, *HASHED[variant])
    model.to(device).eval()
    token_BL = tokens_of(dictionary).to(device)
    with torch.no_grad():
        alone, _ = model(token_BL[:1, :5])
        for place in (slice(0, 5), slice(11, 16)):
            both = token_BL[:2].clone()
            both[0] = dictionary.pad()
            both[0, place] = token_BL[0, :5]
            logits, extra = model(both)
            assert_near(logits[0, place], alone[0].cpu().double(), 10 * FP32, "logits")
            assert all(RoutingReport(report.cpu()).tokens == 5 + 16 for report in extra["routing"].values())


@pytest.mark.parametrize("variant", HASHED)
def test_a_hash_model_waits_where_the_dense_one_does(variant, data, cuda, monkeypatch):
    """Forward and backward in bf16; but for looking for padding, which is once a forward pass."""
    monkeypatch.setattr(RoutingContext, "of_tokens", classmethod(lambda cls, *_: cls(None)))
    found = []
    for arguments in ((), HASHED[variant]):
        dictionary, model, _ = model_of(data, *arguments)
        model.to(cuda, torch.bfloat16)
        token_BL = tokens_of(dictionary).to(cuda)
        grad_BLV = torch.randn(3, 16, len(dictionary)).to(cuda, torch.bfloat16)
        model(token_BL)[0].backward(grad_BLV)  # makes what is made once
        torch.cuda.synchronize()
        with waits.recorded() as places:
            model(token_BL)[0].backward(grad_BLV)
        found.append(places)
    dense, sparse = found
    print(f"dense: {dense}\n{variant}: {sparse}")
    assert not waits.in_package(sparse)
    assert sorted(sparse) == sorted(dense)
