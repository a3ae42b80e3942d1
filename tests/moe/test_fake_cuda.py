"""Device mistakes, shown without a GPU: sparse layers and whole decoders on a pretended one (`fake_cuda`).

On `cuda` they run forward, on `meta` forward and backward (groups of 64 ranks on `meta` only, of 512 on `cuda` only). A
hash layer in bfloat16 waits for nothing. The waits that are there by design are named in `waits_of` and in
`test_a_decoder`; any other fails, as does one that is missing.

Left for a card: whether values are right, kernels (`_is_right` tries grouped products), autocast, gradients on `cuda`
itself, streams (an event is only counted: a copy that is read too early is not seen), CUDA graphs, BASE's solver,
dispatch by fairscale, checkpointed activations of whole decoder layers, the feature `predicted`, and fairseq's
sinusoidal positions (`shape_as_tensor`: "its data is not allocated yet").
"""

import pytest
import torch
import torch.distributed as dist
from fairseq.models.transformer import TransformerConfig
from fake_cuda import CONDITION, EVENT, MASK, PLACES, Wait, moved, pretend
from plugin import build
from torch.testing._internal.distributed.fake_pg import FakeStore

from fairseq_hash.hashing import Feature
from fairseq_hash.hashing.lookup import lookup_rows, tensors
from fairseq_hash.hashing.words import word_index
from fairseq_hash.lm.sparse_layers import Place, build_sparse_layer
from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.dispatchers import make_dispatcher
from fairseq_hash.moe.kernels.feed_forward import GPU_WAYS
from fairseq_hash.moe.routers import SwitchRouter
from fairseq_hash.moe.routing_context import HashRoute, RoutingContext
from fairseq_hash.moe.routing_stats import names_of
from fairseq_hash.options.sparse_options import SparseOptions
from fairseq_hash.parallel.groups import ExpertParallel, expert_parallel

LENGTH, BATCH, WIDTH, HIDDEN, PAD = 6, 3, 16, 32, 1
DEVICES = ("cuda", "meta")
TWO = {"router": "hash", "experts_per_token": 2}
ROUTERS = {
    "hash": {"router": "hash"},
    "hash, uniform weights": TWO,
    "hash, learned weights": {**TWO, "hash_weights": "learned", "hash_score": "sqrt-softplus"},
    "MultiHash": {"router": "hash", "multi_hash": 2},
    "hash, capacity": {"router": "hash", "capacity_factor": 1.0},
    "switch": {"router": "switch", "router_jitter": 0.1},
    "switch, capacity": {"router": "switch", "capacity_factor": 1.0},
    "gshard": {"router": "gshard"},
    "sinkhorn, evaluation": {"router": "sinkhorn"},
    "base": {"router": "base"},
    "base, evaluation": {"router": "base"},
    "stablemoe": {"router": "stablemoe"},
    "stablemoe, fixed": {"router": "stablemoe"},
    "random-linear": {"router": "random-linear"},
}
FORMS = {
    "plain": {},
    "plain, recomputed, shared": {"recompute_hidden": True, "shared_expert": True},
    "gated, shared": {"expert_form": "swiglu", "swiglu_limit": 1.0, "shared_expert": True},
    "gated, recomputed": {"expert_form": "swiglu", "recompute_hidden": True},
    "inserted": {"sparse_placement": "insert", "expert_sublayers": 2},
    "inserted, recomputed": {"sparse_placement": "insert", "recompute_hidden": True},
}


def waits_of(options, dtype, parallel):
    """Return the waits of a layer and its plan, by design."""
    rows = LENGTH * BATCH * options.experts_per_token * options.multi_hash * (1 + (options.router == "gshard"))
    waits = []
    if options.capacity_factor:  # how many rows are left
        rows -= 5
        waits.append((MASK, rows))
    # An all-to-all takes the split sizes from the host, once for each plan; and the host cuts out each expert's rows.
    if parallel.is_shared or dtype != torch.bfloat16:
        waits.append((EVENT, rows))
    return waits


def run(router, form, dtype, device, parallel):
    """Make a layer, and run it forward; on meta backward too."""
    options = SparseOptions(num_experts=parallel.num_experts, sparse_layers="0", **ROUTERS[router], **FORMS[form])
    options.check()
    cfg = TransformerConfig()
    cfg.decoder.embed_dim, cfg.decoder.ffn_embed_dim, cfg.activation_dropout = WIDTH, HIDDEN, 0.1
    is_hash = options.router == "hash"
    place = Place(0, options.router, 0 if is_hash else None, vocabulary=99)
    layer = build_sparse_layer(options, cfg, make_dispatcher(parallel), place)
    if router == "base":  # its solver runs on the host
        layer.router.assign = lambda score_TE: score_TE.argmax(dim=1)
    if "fixed" in router:
        layer.router._updates = options.stable_updates
    layer.train("evaluation" not in router)
    with pretend(device, *waits_of(options, dtype, parallel)):
        moved(layer, device, dtype)
        token_BL = torch.zeros(BATCH, LENGTH, dtype=torch.int64, device=device)
        context = RoutingContext(None, [hash_route(options, parallel, device)] if is_hash else [], token_BL=token_BL)
        x_LBD = torch.zeros(LENGTH, BATCH, WIDTH, dtype=dtype, device=device, requires_grad=device == "meta")
        y_LBD, report = layer(x_LBD, context)
        assert (y_LBD.shape, y_LBD.dtype, y_LBD.device.type) == (x_LBD.shape, dtype, device)
        numbers = 2 + len(names_of(layer.statistics)) + parallel.num_experts
        assert report.shape == (numbers,) and report.device.type == device
        if device == "meta":
            (y_LBD.square().sum() + report.sum()).backward()
            for tensor in (x_LBD, *layer.parameters()):
                assert (tensor.grad.shape, tensor.grad.device.type) == (tensor.shape, device)


def hash_route(options, parallel, device):
    """Return what a decoder makes of a table once a forward pass."""
    choices = options.experts_per_token * options.multi_hash
    expert_TK = torch.zeros(LENGTH * BATCH, choices, dtype=torch.int64, device=device)
    weight_TK = torch.ones(expert_TK.shape, device=device) if options.experts_per_token > 1 else None
    plan = make_dispatcher(parallel.in_segments(options.multi_hash)).begin(expert_TK, options.capacity_factor)
    return HashRoute(Assignment(expert_TK, weight_TK), plan, options.multi_hash)


def pairs():
    """Yield each router with each kind of expert that it goes with, and one with every form."""
    for router in ROUTERS:
        forms = FORMS if router == "hash" else ("plain, recomputed, shared", "gated, shared", "inserted")
        yield from ((router, form) for form in forms if router != "MultiHash" or form.startswith("plain"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("router", "form"), pairs())
def test_a_layer(router, form, device):
    run(router, form, torch.bfloat16, device, ExpertParallel(4))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("router", "form", "dtype", "way"),
    [
        *((router, "plain", torch.float32, "padded") for router in ROUTERS),
        *(("hash", form, torch.float16, "padded") for form in FORMS),
        *(("hash", form, torch.float16, "loop") for form in ("plain", "gated, recomputed")),
    ],
    ids=str,
)
def test_ways_that_wait_for_the_sizes(monkeypatch, router, form, dtype, way, device):
    monkeypatch.setitem(GPU_WAYS, dtype, way)
    run(router, form, dtype, device, ExpertParallel(2))


@pytest.fixture
def ranks():
    """Pretended ranks, of which this process is one: what it sends is lost, what it gets has shapes only."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=512)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("size", "device"), [(8, "cuda"), (8, "meta"), (64, "meta"), (512, "cuda")])
@pytest.mark.parametrize("router", ROUTERS)
def test_ranks_that_share_experts(ranks, router, size, device):
    """The split sizes are the one wait of a plan; here each rank gets as many rows as it sends."""
    experts_of_rank = 1 if size == 512 else 2
    form, dtype = ("plain, recomputed, shared", torch.float32) if size == 64 else ("plain", torch.bfloat16)
    run(router, form, dtype, device, expert_parallel(experts_of_rank * size, size))


@pytest.fixture
def dictionary(tmp_path):
    (tmp_path / "dict.txt").write_text("".join(f"word{rank} {60 - rank}\n" for rank in range(60)))
    return tmp_path


BIGRAMS = ("--router", "hash", "--hash-feature", "bigram", "--hash-table", "random", "--hash-buckets", "99")
POSITIONS = ("--router", "hash", "--hash-feature", "position", "--hash-table", "random")


@pytest.mark.parametrize(
    ("options", "padding"),
    [
        (("--router", "hash"), True),
        ((*BIGRAMS, "--experts-per-token", "2", "--hash-weights", "learned", "--shared-expert"), False),
        ((*POSITIONS, "--hash-per-layer", "--multi-hash", "2"), False),
        (("--router", "hash", "--experts-per-token", "2", "--sparse-placement", "insert"), False),
        (("--router", "hash,switch", "--expert-form", "swiglu", "--recompute-hidden"), True),
    ],
    ids=str,
)
def test_a_decoder(dictionary, options, padding):
    """Two waits a forward pass: we ask whether there is padding (and where, if so), and fairseq asks the same."""
    # Learned positions: the sinusoidal ones need a tensor with values.
    chosen = ("--num-experts", "4", "--sparse-layers", "0,1", "--decoder-learned-pos", *options)
    _, _, model, _ = build(dictionary, *chosen)
    waits = [(CONDITION, not padding), *([(PLACES, LENGTH * BATCH - 2)] if padding else []), (CONDITION, padding)]
    for device in DEVICES:
        with pretend(device, *waits):
            moved(model, device, torch.bfloat16)
            # fairseq makes it on the host and copies it, once.
            model.decoder._future_mask = torch.empty(LENGTH, LENGTH, dtype=torch.bfloat16, device=device)
            token_BL = torch.zeros(BATCH, LENGTH, dtype=torch.int64, device=device)
            logits_BLV, extra = model(token_BL)
            assert (logits_BLV.shape[:2], logits_BLV.device.type) == ((BATCH, LENGTH), device)
            assert len(extra["routing"]) == 2
            if device == "meta":
                (logits_BLV.sum() + sum(report.sum() for report in extra["routing"].values())).backward()
                assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["token", "previous", "bigram", "ngram", "history", "position", "future", "word"])
def test_features(name, device):
    index = tensors(word_index(["<s>", "<pad>", "▁un", "do"], ["▁undo"])) if name == "word" else {}
    with pretend(device):
        index = {key: torch.empty(value.shape, dtype=value.dtype, device=device) for key, value in index.items()}
        token_BL = torch.zeros(BATCH, LENGTH, dtype=torch.int64, device=device)
        row_BL = lookup_rows(Feature(name, {"ngram": 3, "history": 2}.get(name, 0)), token_BL, PAD, 97, index)
        assert (row_BL.shape, row_BL.device.type) == (token_BL.shape, device)


TWO_DEVICES = "same device|two different devices"  # torch 2.11 says the latter
MISTAKES = {
    "a number is read": (lambda x: x.sum().item(), "_local_scalar_dense"),
    "numbers are read": (lambda x: x.tolist(), "numbers are read"),
    "a condition": (lambda x: 1 if x.sum() > 0 else 0, "a condition"),
    "places": (lambda x: x.nonzero(), "nonzero"),
    "a mask": (lambda x: x[x > 0], "a choice by a mask"),
    "sizes that only values tell": (lambda x: x.flatten().long().bincount(), "bincount"),
    "numbers are copied": (lambda x: torch.tensor([1.0], device=x.device), "numbers are copied"),
    "a tensor is copied to the host": (lambda x: x.cpu(), "between host and device"),
    "a tensor is copied from the host": (lambda x: torch.arange(3).to(x.device), "between host and device"),
    "an index on the host": (lambda x: x[torch.arange(3)], "an index"),
    "a tensor on the host": (lambda x: x + torch.arange(WIDTH), TWO_DEVICES),
    "an expert's number on the host": (lambda x: x.index_select(0, torch.arange(3)), TWO_DEVICES),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_router_is_noticed(monkeypatch, mistake):
    wrong, message = MISTAKES[mistake]
    forward = SwitchRouter.forward
    monkeypatch.setattr(SwitchRouter, "forward", lambda self, x_TD: (wrong(x_TD), forward(self, x_TD))[1])
    with pytest.raises((RuntimeError, Wait), match=message):
        run("switch", "plain", torch.bfloat16, "cuda", ExpertParallel(4))


def test_a_wait_that_is_gone_is_noticed():
    with pytest.raises(AssertionError, match="did not happen"), pretend("cuda", (EVENT, 3)):
        pass
