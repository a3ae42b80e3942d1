"""Training with shared experts: half precision, checkpoints at another number of ranks, what a layer waits for."""

import pytest
import ranks
import recorded
import torch
from exactness import TOLERANCE, arguments, one_process, whole

SPARSE = ("--router", "hash", "--num-experts", "4", "--sparse-layers", "0,1")
FORMS = {
    "bf16": ("--bf16",),
    "bf16, replicas": ("--bf16", "--expert-placement", "balanced", "--expert-replicas", "2"),
    "memory-efficient bf16": ("--memory-efficient-bf16",),
    "fp16": ("--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", "4"),
    "memory-efficient fp16": ("--memory-efficient-fp16", "--fp16-init-scale", "4"),
}


@pytest.fixture(scope="module")
def half_precision(data):
    """One process and two, in each form of half precision."""
    cases = {name: arguments("hash", 4, "adam", *form) for name, form in FORMS.items()}
    many = ranks.run(2, "recorded:train_all", str(data), cases)
    return recorded.train_all(data, {name: one_process(words, 2) for name, words in cases.items()}), many


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_trains_as_one_process(half_precision, form):
    alone, many = half_precision[0][form], [record[form] for record in half_precision[1]]
    # Gradients are added up in half precision: a rounding of 4e-3 (bf16) each time, on single values.
    tolerance = {"rtol": 1e-2, "atol": 0}
    for what in ("loss", "norm"):
        assert all(record[what] == many[0][what] for record in many)
        torch.testing.assert_close(torch.tensor(many[0][what]), torch.tensor(alone[what]), **tolerance)
    for name, value in alone["parameters"].items():
        assert whole(many, lambda record: record["parameters"], name).dtype == value.dtype
        assert value.dtype in (torch.bfloat16, torch.float16)


def test_all_ranks_skip_an_update_that_overflows_on_one(data):
    words = arguments("hash", 4, "adam", "--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", "4")
    assert ranks.run(2, "training_ranks:train_with_overflow", str(data), words) == [(2.0, 6)] * 2


def test_base_trains_with_each_balance(data):
    cases = {balance: arguments("base", 4, "adam", "--base-balance", balance) for balance in ("global", "shuffle")}
    first, second = ranks.run(2, "recorded:train_all", str(data), cases)
    for balance in cases:
        assert first[balance]["loss"] == second[balance]["loss"]
        assert sum(first[balance]["loss"][-5:]) < sum(first[balance]["loss"][:5])
    assert first["global"]["loss"] != first["shuffle"]["loss"]


@pytest.mark.parametrize(
    ("world_size", "more"),
    [(2, ()), pytest.param(4, ("--expert-parallel-size", "2", "--checkpoint-activations"), marks=pytest.mark.slow)],
)
def test_fully_sharded_dense_parameters_train_as_one_process(data, world_size, more):
    # On a CPU, where fairscale's streams are stubs: nothing here shows that they are used rightly on a GPU.
    words = arguments("hash", 4, "sgd", "--update-freq", "2", *more)
    alone = recorded.train(data, one_process(words, world_size))
    for record in ranks.run(world_size, "training_ranks:train_fully_sharded", str(data), words):
        for what in ("loss", "norm"):
            expected = torch.tensor(alone[what])
            torch.testing.assert_close(torch.tensor(record[what]), expected, rtol=TOLERANCE, atol=0)
        assert sum(record["validation"]) == pytest.approx(sum(alone["validation"]), rel=TOLERANCE)


@pytest.mark.parametrize(("router", "expected"), [("hash", 1), ("switch", 2)])
def test_hash_layers_exchange_split_sizes_once_a_forward(data, router, expected):
    done = ranks.run(2, "training_ranks:split_exchanges", str(data), *SPARSE, "--router", router)
    assert done == [(expected, 0)] * 2


def test_hash_layers_wait_for_nothing_but_the_split_sizes(data):
    # Three lists are read where the plan ends its exchange: rows sent, rows received, rows of each expert.
    assert ranks.run(2, "training_ranks:waits_inside_layers", str(data), *SPARSE) == [(3, 0)] * 2
