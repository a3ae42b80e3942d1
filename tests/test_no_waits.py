"""A hash layer never waits for the device: it runs on the device `meta`, where there is nothing to wait for.

Tensors there have shapes and no values, so that whatever reads a value on the host (`item`, `tolist`, `nonzero`, a
comparison in an `if`) fails.
"""

import contextlib

import pytest
import torch

from fairseq_hash import feed_forward
from fairseq_hash.dispatch import PlanUnderWay
from fairseq_hash.experts import ExpertFeedForward, GatedFeedForward
from fairseq_hash.layer import HashRoute, RoutingContext, SparseLayer
from fairseq_hash.parallel import ExpertParallel
from fairseq_hash.routers import Assignment, HashWeights

EXPERTS, WIDTH, HIDDEN, LENGTH, BATCH = 4, 16, 32, 6, 3


@pytest.fixture
def on_meta(monkeypatch):
    """Everything without values, by the path of a GPU."""
    monkeypatch.setattr(feed_forward, "choose_way", lambda *_: "grouped")
    # Autocast knows no such device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with torch.device("meta"):
        yield


def run(layer, choices, capacity_factor=0.0, padded=False, segments=1):
    """Forward and backward; returns the gradients' shapes."""
    token_N = torch.zeros(LENGTH * BATCH, dtype=torch.int64)
    tokens = LENGTH * BATCH
    place_T = None
    if padded:  # where padding stands is found once a forward pass, before the layers
        tokens -= 2
        place_T = token_N[:tokens]
    expert_TK = torch.zeros(EXPERTS, choices, dtype=torch.int64)[:1].expand(tokens, choices)
    plan = PlanUnderWay(expert_TK, ExpertParallel(EXPERTS * segments), capacity_factor)
    weight_TK = torch.full((tokens, choices), 0.5) if choices > segments else None
    context = RoutingContext(place_T, [HashRoute(Assignment(expert_TK, weight_TK), plan, segments)])
    x_LBD = torch.zeros(LENGTH, BATCH, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    y_LBD, report = layer(x_LBD, context)
    assert y_LBD.shape == x_LBD.shape and report.shape == (5 + EXPERTS,)
    y_LBD.sum().backward()
    assert x_LBD.grad.shape == x_LBD.shape
    assert all(p.grad.shape == p.shape for p in layer.experts.parameters())


def hash_layer(experts, router=None, segments=1):
    experts = experts.to(torch.bfloat16)
    return SparseLayer(router, experts, ExpertParallel(EXPERTS), 0.0, 0.0, hash_route=0, segments=segments)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_hash_layer(on_meta, padded, recompute):
    experts = ExpertFeedForward(range(EXPERTS), WIDTH, HIDDEN, torch.relu, 0.1, (0,), recompute=recompute)
    run(hash_layer(experts), 1, padded=padded)


def test_several_experts_a_token_with_learned_weights(on_meta):
    experts = GatedFeedForward(range(EXPERTS), WIDTH, HIDDEN, 1.0, 0.0, (0,))
    run(hash_layer(experts, HashWeights(WIDTH, EXPERTS, "sigmoid", 1.0)), 2)


def test_multi_hash(on_meta):
    experts = ExpertFeedForward(range(EXPERTS), WIDTH, HIDDEN, torch.relu, 0.0, (0,), segments=2)
    run(hash_layer(experts, segments=2), 2, segments=2)


def test_a_wait_would_be_noticed(on_meta):
    """With a capacity the plan has to know how many rows are left: a wait, once a forward pass, before the layers."""
    experts = ExpertFeedForward(range(EXPERTS), WIDTH, HIDDEN, torch.relu, 0.0, (0,))
    with pytest.raises((NotImplementedError, RuntimeError)):
        run(hash_layer(experts), 1, capacity_factor=1.0)
