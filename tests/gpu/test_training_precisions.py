"""Every kind of half precision against fp32, and going on from a checkpoint of each."""

import shutil

import pytest

from gpu.trainings import HASH, SPARSE, SWITCH, Several, finish, numbers, train

UPDATES, LATER = 12, 16
MODELS = {
    "hash": HASH,
    "switch": (*SWITCH, "--capacity-factor", "1.25", "--z-loss-weight", "0.001"),
    "gated": (*HASH, "--expert-form", "swiglu", "--shared-expert", "--experts-per-token", "2")
    + ("--hash-weights", "learned"),
    "MultiHash": (*HASH, "--multi-hash", "4"),
    "inserted": ("--router", "base", *SPARSE, "--sparse-placement", "insert", "--expert-sublayers", "2"),
}
PRECISIONS = {
    "fp16, flattened": ("--fp16",),
    "fp16": ("--fp16", "--fp16-no-flatten-grads"),
    "memory-efficient fp16": ("--memory-efficient-fp16",),
    "bf16": ("--bf16",),
    "memory-efficient bf16": ("--memory-efficient-bf16",),
    "amp": ("--amp",),
}
# A learned router decides some close choices the other way: BASE moves tokens of all experts for one of them.
TOLERANCE = {"inserted": 0.04}
ON_A_CPU = [("hash", "bf16"), ("hash", "memory-efficient bf16")]


def chosen(device):
    """Return the pairs of model and precision that run on a device."""
    pairs = [(model, precision) for model in MODELS for precision in PRECISIONS]
    return pairs if device.type == "cuda" else ON_A_CPU


@pytest.fixture(scope="module")
def runs(device, data, tmp_path_factory):
    """For each model the process with its trainings in fp32 and in all precisions, and one in which these go on."""
    folder, started = tmp_path_factory.mktemp("precisions"), {}
    for model, options in MODELS.items():
        precisions = [precision for name, precision in chosen(device) if name == model]
        if precisions:
            jobs = {"fp32": train(data, device, folder / model / "fp32", LATER, "--no-save", *options)}
            for name in precisions:
                where = folder / model / name
                jobs[name] = train(data, device, where, UPDATES, *options, *PRECISIONS[name])
            started[model] = Several(device, folder / model / "said", jobs)
    finish(*started.values())
    resumed = {}
    for model in ("hash", "switch") if device.type == "cuda" else ():
        jobs = {}
        for name in (precision for owner, precision in chosen(device) if owner == model):
            before, after = folder / model / name, folder / model / f"{name}, on"
            if before.exists():
                shutil.copytree(before, after)
            jobs[name] = train(data, device, after, LATER, *MODELS[model], *PRECISIONS[name])
        if jobs:
            resumed[model] = Several(device, folder / model / "said later", jobs)
    finish(*resumed.values())
    return started, resumed


def skip_on_a_cpu(device, model, precision):
    if (model, precision) not in chosen(device):
        pytest.skip("on the CPU a few cases show that the test works; fairseq's fp16 is for a GPU")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", MODELS)
def test_half_precision_trains_as_fp32(runs, device, model, precision):
    skip_on_a_cpu(device, model, precision)
    exact = numbers(runs[0][model].said("fp32"))
    found = numbers(runs[0][model].said(precision))
    assert list(found) == list(range(1, UPDATES + 1)), "updates were skipped"
    far = {update: (loss, exact[update]) for update, loss in found.items()}
    far = {n: pair for n, pair in far.items() if not abs(pair[0] / pair[1] - 1) <= TOLERANCE.get(model, 0.02)}
    assert not far, f"losses here and in fp32, by update: {far}"
    assert found[UPDATES] < found[1] - 0.1, "the loss does not fall"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", ["hash", "switch"])
def test_half_precision_goes_on_from_its_checkpoint(runs, device, model, precision):
    skip_on_a_cpu(device, model, precision)
    if device.type == "cpu":
        pytest.skip("takes long on the CPU")
    exact = numbers(runs[0][model].said("fp32"))
    runs[0][model].said(precision)
    found = numbers(runs[1][model].said(precision))
    assert list(found) == list(range(UPDATES + 1, LATER + 1))
    for update, loss in found.items():
        assert loss == pytest.approx(exact[update], rel=0.02), f"update {update}"
