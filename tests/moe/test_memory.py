"""The memory of n-grams: rows and sums against naive loops, with all gradients; in a model; shared by ranks."""

import pytest
import ranks
import reference
import torch
from plugin import ROUTERS, build

from fairseq_hash.core.errors import UserError
from fairseq_hash.moe.memory import MemoryLayer
from fairseq_hash.moe.memory_rows import MemoryRows, MemoryShape
from fairseq_hash.moe.parameter_counts import count_parameters
from fairseq_hash.moe.routing_context import RoutingContext
from fairseq_hash.parallel.groups import ExpertParallel

PAD, SYMBOLS, WIDTH = 1, 23, 6
ORDERS, HEADS, ROWS, LAYER = (1, 2, 3), 2, 18, 4
SHAPE = MemoryShape(ORDERS, HEADS, ROWS, 8, SYMBOLS)
# Sentences of other lengths, with padding behind them and before.
SEQUENCES = ([5, 9, 5, 9, 22, 5, 9], [7, 7, 3], [4, 2, 8, 9, 5])
PLACES = (slice(0, 7), slice(0, 3), slice(2, 7))
MEMORY = ("--memory-layers", "0,1", "--memory-rows", "29", "--memory-width", "8", "--memory-heads", "2")
WITH_ROUTERS = {"none": ("--router", "none"), "none, orders 1 and 4": ("--router", "none", "--memory-orders", "4,1")}
WITH_ROUTERS |= ROUTERS


def padded():
    token_BL = torch.full((3, 7), PAD)
    for token_L, sequence, place in zip(token_BL, SEQUENCES, PLACES, strict=True):
        token_L[place] = torch.tensor(sequence)
    return token_BL


def make_layer(parallel):
    """A memory whose values are not zero, and its rows."""
    torch.manual_seed(3)
    rows, layer = MemoryRows(SHAPE, LAYER, 7, parallel), MemoryLayer(SHAPE, LAYER, WIDTH, parallel)
    generator = torch.Generator().manual_seed(1)
    for parameter in (layer.value, layer.gain):
        torch.nn.init.normal_(parameter, generator=generator)
    return rows, layer


def run(rows, layer, token_BL, x_LBD):
    context = RoutingContext.of_tokens(token_BL, PAD)
    row_TJ = context.drop_padding(rows(token_BL, PAD).transpose(0, 1))
    context.memory_lookups[LAYER] = rows.begin(row_TJ)
    return layer(x_LBD, context)


def naive_rows(rows, sequence):
    return reference.memory_rows(sequence, ORDERS, HEADS, ROWS, SYMBOLS, rows.seed_J.tolist(), PAD)


def test_rows_are_those_of_the_naive_loop_whatever_the_padding():
    """And heads and layers have seeds of their own."""
    rows, _ = make_layer(ExpertParallel(1))
    row_BLJ = rows(padded(), PAD)
    for row_LJ, sequence, place in zip(row_BLJ, SEQUENCES, PLACES, strict=True):
        assert row_LJ[place].tolist() == naive_rows(rows, sequence)
        assert rows(torch.tensor([sequence]), PAD)[0].tolist() == naive_rows(rows, sequence)
    others = [MemoryRows(SHAPE, *of, ExpertParallel(1)) for of in ((LAYER, 8), (LAYER + 1, 7))]
    seeds = torch.cat([rows.seed_J, *(other.seed_J for other in others)])
    assert len(seeds.unique()) == len(seeds) == 3 * len(ORDERS) * HEADS


def test_the_layer_and_all_its_gradients_are_those_of_the_naive_loop():
    """The layer computes in fp32, the loop in fp64."""
    rows, layer = make_layer(ExpertParallel(1))
    token_BL, x_LBD = padded(), torch.randn(7, 3, WIDTH, requires_grad=True)
    y_LBD, grad_LBD = run(rows, layer, token_BL, x_LBD), torch.randn(7, 3, WIDTH)
    y_LBD.backward(grad_LBD)
    names = ("experts.weight", "key", "value", "gain")
    given = {name: layer.get_parameter(name).detach().double().requires_grad_() for name in names}
    x_double = x_LBD.detach().double().requires_grad_()
    expected = torch.zeros_like(x_double)
    for b, (sequence, place) in enumerate(zip(SEQUENCES, PLACES, strict=True)):
        table_Nw, *weights = (given["experts.weight"].flatten(0, 1), *(given[name] for name in names[1:]))
        found = [
            reference.memory(x_D, of_token, table_Nw, *weights)
            for x_D, of_token in zip(x_double[place, b], naive_rows(rows, sequence), strict=True)
        ]
        expected = expected.index_put((torch.arange(7)[place], torch.tensor(b)), torch.stack(found))
    expected.backward(grad_LBD.double())
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(y_LBD.double(), expected, **close)
    torch.testing.assert_close(x_LBD.grad.double(), x_double.grad, **close)
    for name in names:
        torch.testing.assert_close(layer.get_parameter(name).grad.double(), given[name].grad, **close)
    assert given["experts.weight"].grad.count_nonzero() > 50


PLACED = (1, 4, 0, 2, 3, 5)


def share(world_size, order):
    """What one of several ranks computes: values, and gradients of its rows; `ranks` runs it."""
    rank, group = torch.distributed.get_rank(), torch.distributed.new_group(list(range(world_size)))
    # 118 rows in 6 shares of 20, two for each rank: the last one has two rows that nobody looks up.
    parallel = ExpertParallel(2 * world_size, world_size, rank, world_size, group).placed(order)
    rows, layer = make_layer(parallel)
    token_BL, x_LBD = batch(rank)
    y_LBD = run(rows, layer, token_BL, x_LBD.requires_grad_())
    y_LBD.backward(torch.ones_like(y_LBD))
    return {
        "y": y_LBD.detach(),
        "x": x_LBD.grad,
        "rows": layer.experts.weight.detach(),
        "gradient": layer.experts.weight.grad,
    }


def batch(rank):
    """A batch of each rank; the last has none but padding."""
    generator = torch.Generator().manual_seed(rank)
    token_BL = torch.randint(2, SYMBOLS, (2, 5), generator=generator)
    return token_BL if rank < 2 else torch.full_like(token_BL, PAD), torch.randn(5, 2, WIDTH, generator=generator)


@pytest.mark.parametrize("order", [tuple(range(6)), PLACED])
def test_ranks_that_share_rows_compute_what_one_does(order):
    shared = ranks.run(3, "test_memory:share", 3, order)
    parallel = ExpertParallel(6)
    rows, layer = make_layer(parallel)
    assert torch.equal(torch.cat([of_rank["rows"] for of_rank in shared]), layer.experts.weight[list(order)])
    for rank, of_rank in enumerate(shared):
        token_BL, x_LBD = batch(rank)
        y_LBD = run(rows, layer, token_BL, x_LBD.requires_grad_())
        y_LBD.backward(torch.ones_like(y_LBD))
        torch.testing.assert_close(of_rank["y"], y_LBD.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(of_rank["x"], x_LBD.grad, rtol=1e-6, atol=1e-6)
    gradient = torch.cat([of_rank["gradient"] for of_rank in shared])
    torch.testing.assert_close(gradient, layer.experts.weight.grad[list(order)], rtol=1e-5, atol=1e-6)


def make_model(data, *arguments):
    """A model whose memories are not zero, and tokens."""
    _, task, model, _ = build(data, *arguments, "--dropout", "0")
    for module in model.modules():
        if isinstance(module, MemoryLayer):
            torch.nn.init.normal_(module.value)
    generator = torch.Generator().manual_seed(0)
    return model.eval(), torch.randint(4, len(task.source_dictionary), (3, 12), generator=generator)


@pytest.mark.parametrize("router", WITH_ROUTERS)
def test_a_model_sees_no_later_token_and_generates_what_one_pass_gives(data, router):
    model, token_BL = make_model(data, *MEMORY, *WITH_ROUTERS[router])
    full_BLV, _ = model(token_BL)
    state = {}
    steps = [model.decoder(token_BL[:, : n + 1], incremental_state=state)[0] for n in range(token_BL.shape[1])]
    torch.testing.assert_close(torch.cat(steps, dim=1), full_BLV, rtol=1e-4, atol=1e-5)
    changed_BL = token_BL.clone()
    changed_BL[:, 8:] = changed_BL[:, 8:].flip(1)
    changed_BLV, _ = model(changed_BL)
    torch.testing.assert_close(changed_BLV[:, :8], full_BLV[:, :8], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed_BLV[:, 8:], full_BLV[:, 8:], rtol=1e-2)
    pad = torch.full((3, 2), model.decoder.padding_idx)
    for padded_BL, place in ((torch.cat([pad, token_BL], 1), slice(2, 14)), (torch.cat([token_BL, pad], 1), slice(12))):
        torch.testing.assert_close(model(padded_BL)[0][:, place], full_BLV, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ["none", *ROUTERS])
def test_a_new_memory_changes_nothing_but_the_gradients(data, router):
    """It starts at zero, and draws no random number that another part of the model would draw."""
    results = []
    for memory in ((), MEMORY):
        torch.manual_seed(5)
        _, task, model, _ = build(data, *memory, *WITH_ROUTERS[router], "--router-jitter", "0")
        token_BL = torch.arange(4, 28).view(2, 12)
        results.append((model.eval()(token_BL)[0], torch.rand(1), model))
    (before, drawn, _), (after, drawn_after, model) = results
    assert torch.equal(before, after) and torch.equal(drawn, drawn_after)
    after.sum().backward()
    memories = [module for module in model.modules() if isinstance(module, MemoryLayer)]
    assert len(memories) == 2 and all(memory.value.grad.abs().max() > 0 for memory in memories)


def test_checkpointed_activations_give_the_same_gradients(data):
    gradients = []
    for more in ((), ("--checkpoint-activations",)):
        torch.manual_seed(5)
        model, token_BL = make_model(data, *MEMORY, *ROUTERS["hash"], *more)
        model.train()(token_BL)[0].square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_parameters_are_counted(data):
    model, _ = make_model(data, *MEMORY, "--router", "none")
    total = sum(parameter.numel() for parameter in model.parameters())
    # Two memories of two orders: 2 heads of 29 rows of 4 values each, of which a token uses one row.
    assert count_parameters(model) == (total, total - 2 * 2 * 2 * 29 * 4 + 2 * 2 * 2 * 4)
    model, _ = make_model(data, *MEMORY, *ROUTERS["hash"])  # 116 rows in 4 shares: none is added
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(model)[0]


BAD = [
    (("--memory-layers", "2"), "--memory-layers 2: layer 2 does not exist; the decoder has layers 0 to 1"),
    (("--memory-layers", "0,0"), "--memory-layers 0,0 names a layer twice; name each layer once"),
    (("--memory-layers", "first"), "--memory-layers first is not a list of layer numbers; give numbers such as 1,3"),
    ((*MEMORY, "--memory-orders", "0,2"), "--memory-orders 0,2: 0 is out of range; give 1 to 64 tokens"),
    ((*MEMORY, "--memory-orders", ","), "--memory-orders , names no length; give numbers such as 1,3"),
    ((*MEMORY, "--memory-heads", "0"), "--memory-heads 0 is out of range; give a number of 1 or more"),
    ((*MEMORY, "--memory-rows", "0"), "--memory-rows 0 is out of range"),
    ((*MEMORY, "--memory-seed", "-1"), "--memory-seed -1 is out of range"),
    ((*MEMORY, "--memory-width", "9"), "--memory-width 9 is not a multiple of --memory-heads 2"),
    ((*MEMORY, "--decoder-layerdrop", "0.1"), "--decoder-layerdrop 0.1 skips memories; leave it out"),
    ((*MEMORY, "--decoder-layers-to-keep", "0"), "--decoder-layers-to-keep 0 renumbers the layers that"),
    ((*MEMORY, "--memory-rows", "10000000000000"), "one rank's rows of 2 memories (--memory-rows 10000000000000"),
]


@pytest.mark.parametrize("arguments, line", BAD, ids=[line[:40] for _, line in BAD])
def test_bad_options_end_in_one_line(data, arguments, line):
    with pytest.raises(SystemExit) as ended:
        build(data, "--router", "none", *arguments)
    assert f"fairseq_hash: {line}" in str(ended.value) and "\n" not in str(ended.value)


def test_fewer_rows_than_shares_are_refused():
    with pytest.raises(UserError, match="makes a memory of 9 rows, fewer than the 10 shares .* give more rows"):
        MemoryShape((2, 3, 4), 3, 1, 6, 23).rows_of_share(10)
    assert MemoryShape((2, 3, 4), 3, 1, 6, 23).rows_of_share(4) == 3
