"""One rank that shares its experts with itself: the exchange over NCCL on a card, over gloo on the CPU.

The plugin exchanges nothing where one rank holds all experts; here it is forced (`train_several`), so that what several
ranks do runs: the exchange of rows and split sizes, fairscale's layer, the norm over all experts, the agreement before
a save, the watchdog. What one rank cannot show: rows that travel to another card, waiting for one.
"""

import pytest

from gpu.one_rank import Case, assert_as_without_a_group, stop_and_go_on
from gpu.trainings import SWITCH

LEGACY, TORCH = ("--ddp-backend", "legacy_ddp"), ("--ddp-backend", "pytorch_ddp")
SHARED = ("wrapped", "shared")
FAIRSCALE = ("--expert-dispatch", "fairscale")
CASES = {
    "legacy_ddp": Case(LEGACY, SHARED),
    "pytorch_ddp": Case(TORCH, SHARED),
    "bf16": Case((*LEGACY, "--bf16"), SHARED, 0.1),
    "fp16": Case((*LEGACY, "--fp16", "--fp16-no-flatten-grads"), SHARED, 0.1),
    "fairscale's layer": Case((*LEGACY, *FAIRSCALE), SHARED),
    "switch": Case(LEGACY, SHARED, model=SWITCH),
    "switch, fairscale's layer": Case((*LEGACY, *FAIRSCALE), SHARED, model=SWITCH),
}
ON_A_CPU = ("legacy_ddp", "pytorch_ddp", "switch, fairscale's layer")


@pytest.fixture(scope="module")
def runs(device, data, tmp_path_factory):
    """Without a process group, with one, and from where it saved."""
    cases = {name: case for name, case in CASES.items() if device.type == "cuda" or name in ON_A_CPU}
    return stop_and_go_on(data, device, tmp_path_factory.mktemp("one rank"), cases)


@pytest.mark.parametrize("name", CASES)
def test_training_is_as_without_a_group(runs, device, name):
    if device.type == "cpu" and name not in ON_A_CPU:
        pytest.skip("on the CPU a few cases show that the test works")
    assert_as_without_a_group(runs, name, CASES[name])
