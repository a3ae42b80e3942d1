"""Trainings on the card and on the CPU: the same losses and gradient norms, in fp32."""

import pytest

from gpu.trainings import HASH, SPARSE, SWITCH, Several, assert_same_losses, finish, numbers, train

UPDATES = 20
LEARNED = (*SPARSE, "--router")
TOPK = (*LEARNED, "topk", "--router-score", "sigmoid", "--balancing")
CASES = {
    "dense": ("--router", "none"),
    "hash": HASH,
    "switch": (*SWITCH, "--capacity-factor", "1.25"),
    "base": ("--router", "base", *SPARSE, "--sparse-placement", "insert"),
    "two experts": (*HASH, "--experts-per-token", "2", "--hash-weights", "learned", "--shared-expert"),
    "MultiHash": (*HASH, "--multi-hash", "4"),
    "gshard": (*LEARNED, "gshard", "--second-expert-policy", "all", "--capacity-factor", "1"),
    "sinkhorn": (*LEARNED, "sinkhorn"),
    "random-linear": (*LEARNED, "random-linear"),
    "stablemoe": (*LEARNED, "stablemoe", "--stable-updates", "10", "--distill-weight", "0.3"),
    "top-2 by bias": (*TOPK, "bias", "--experts-per-token", "2", "--normalize-weights"),
    "top-k by quantile": (*TOPK, "quantile"),
    "hash and memory": (*HASH, "--memory-layers", "1", "--memory-rows", "64", "--memory-heads", "2"),
    "bigrams": (*HASH, "--hash-feature", "bigram", "--hash-table", "random", "--expert-form", "swiglu"),
}
# A learned router may decide a close choice the other way after some rounding: from there on it is another training.
COMPARED = dict.fromkeys(
    ("switch", "base", "gshard", "sinkhorn", "stablemoe", "top-2 by bias", "top-k by quantile"), 10
)
ON_A_CPU = ("hash", "bigrams")


@pytest.fixture(scope="module")
def runs(device, data, tmp_path_factory):
    """The trainings of all cases on the device, and on the CPU."""
    import torch

    folder, started = tmp_path_factory.mktemp("agreement"), []
    for name, where in (("device", device), ("cpu", torch.device("cpu"))):
        cases = [case for case in CASES if device.type == "cuda" or case in ON_A_CPU]
        for part in (cases[::2], cases[1::2]):
            jobs = {case: train(data, where, folder / name / case, UPDATES, "--no-save", *CASES[case]) for case in part}
            started.append(Several(where, folder / name / f"from {part[0]}", jobs))
    return finish(*started)


@pytest.mark.parametrize("case", CASES)
def test_card_and_cpu_train_the_same(runs, device, case):
    if device.type == "cpu" and case not in ON_A_CPU:
        pytest.skip("on the CPU a few cases show that the test works")
    said = [several.said(case) for several in runs if case in several.names]
    first = range(1, COMPARED.get(case, UPDATES) + 1)
    found, expected = ({update: numbers(text)[update] for update in first} for text in said)
    assert_same_losses(found, expected)
    found, expected = (numbers(text, "gnorm") for text in said)
    for update in first:
        assert found[update] == pytest.approx(expected[update], rel=1e-2, abs=1e-3), f"norm of update {update}"
    losses = numbers(said[0])
    assert losses[UPDATES] < losses[1] - 0.1, "the loss does not fall"
