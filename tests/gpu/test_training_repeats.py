"""The same training twice: every tensor of both checkpoints is the same to the bit, the optimizer's included."""

import pytest
import torch

from fairseq_hash.checkpoint.loading import read_checkpoint
from fairseq_hash.checkpoint.sharded_tensor import SavedExperts
from gpu.trainings import HASH, SWITCH, Several, finish, numbers, train

CASES = {
    "hash, fp32": HASH,
    "hash, bf16": (*HASH, "--bf16"),
    "switch, fp32": SWITCH,
    "switch, bf16": (*SWITCH, "--bf16"),
    "two experts, bf16": (*HASH, "--experts-per-token", "2", "--hash-weights", "learned", "--bf16"),
}
ON_A_CPU = ("hash, bf16",)


@pytest.fixture(scope="module")
def runs(device, data, tmp_path_factory):
    """Twice all cases: what was said, and the folders of the checkpoints."""
    folder, started = tmp_path_factory.mktemp("repeats"), []
    for name in ("once", "twice"):
        jobs = {
            case: train(data, device, folder / name / case, 20, *options)
            for case, options in CASES.items()
            if device.type == "cuda" or case in ON_A_CPU
        }
        started.append(Several(device, folder / name / "said", jobs))
    return folder, finish(*started)


def tensors(path):
    """Return the tensors of a checkpoint, by name."""
    state = read_checkpoint(path)
    found = dict(state["model"])
    for number, values in state["last_optimizer_state"]["state"].items():
        found.update((f"optimizer {number} {key}", value) for key, value in values.items())
    found = {name: value.read_all() if isinstance(value, SavedExperts) else value for name, value in found.items()}
    # fairseq's `_float_tensor` is never written: what happened to be in memory, of which only the type is used.
    return {name: value for name, value in found.items() if torch.is_tensor(value) and "_float_tensor" not in name}


@pytest.mark.parametrize("case", CASES)
def test_a_training_repeats_to_the_bit(runs, device, case):
    if device.type == "cpu" and case not in ON_A_CPU:
        pytest.skip("on the CPU a few cases show that the test works")
    folder, both = runs
    losses = [numbers(several.said(case)) for several in both]
    once, twice = (tensors(folder / name / case / "checkpoint_last.pt") for name in ("once", "twice"))
    assert once.keys() == twice.keys() and any(".experts." in name for name in once)
    differ = [name for name in once if not torch.equal(once[name], twice[name])]
    assert not differ, f"{len(differ)} of {len(once)} tensors differ: {differ[:12]}"
    assert losses[0] == losses[1]
