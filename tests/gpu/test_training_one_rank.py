"""One rank in fairseq's data parallel wrappers, over NCCL on a card, over gloo on the CPU: losses are those of none.

fairseq's trainer takes no wrapper where there is one rank; here it is forced (`train_several`), so that the wrappers'
broadcast, reduction and hooks run. What one rank cannot show: waiting for another, a sum of more than one.
"""

import pytest

from gpu.one_rank import Case, assert_as_without_a_group, stop_and_go_on
from gpu.trainings import SWITCH, skip_long

LEGACY, TORCH = ("--ddp-backend", "legacy_ddp"), ("--ddp-backend", "pytorch_ddp")
CASES = {
    "legacy_ddp": Case(LEGACY),
    "pytorch_ddp": Case(TORCH),
    "legacy_ddp, bf16": Case((*LEGACY, "--bf16"), tolerance=0.1),
    "pytorch_ddp, bf16": Case((*TORCH, "--bf16"), tolerance=0.1),
    "pytorch_ddp, fp16 flattened": Case((*TORCH, "--fp16"), tolerance=0.1),
    "switch, legacy_ddp": Case(LEGACY, model=SWITCH),
    "switch, pytorch_ddp": Case(TORCH, model=SWITCH),
}
ON_A_CPU = ("legacy_ddp", "pytorch_ddp")


@pytest.fixture(scope="module")
def runs(device, data, tmp_path_factory):
    """Without a process group, with one, and from where it saved."""
    skip_long(device)
    cases = {name: case for name, case in CASES.items() if device.type == "cuda" or name in ON_A_CPU}
    return stop_and_go_on(data, device, tmp_path_factory.mktemp("one rank"), cases)


@pytest.mark.parametrize("name", CASES)
def test_training_is_as_without_a_group(runs, device, name):
    if device.type == "cpu" and name not in ON_A_CPU:
        pytest.skip("on the CPU a few cases show that the test works")
    assert_as_without_a_group(runs, name, CASES[name])
