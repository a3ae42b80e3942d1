"""One rank with a process group: over NCCL on a card, over gloo on the CPU. The losses are those of none.

fairseq's trainer takes no data parallel wrapper where there is one rank, and the plugin no exchange. Both are forced
here (`train_several`), so that what several ranks do runs: the wrappers' broadcast and reduction, the exchange of rows
and split sizes, the norm over all experts, the agreement before a save, the watchdog. What one rank cannot show: rows
that travel to another card, waiting for one, a sum of more than one. Under torchrun nothing is forced.
"""

import pytest

from gpu.one_rank import Case, assert_as_without_a_group, backend, stop_and_go_on
from gpu.trainings import HASH, SWITCH, assert_same_losses, launch, numbers, train, wait

LEGACY, TORCH = ("--ddp-backend", "legacy_ddp"), ("--ddp-backend", "pytorch_ddp")
SHARED = ("wrapped", "shared")
CASES = {
    "legacy_ddp": Case((*HASH, *LEGACY)),
    "pytorch_ddp": Case((*HASH, *TORCH)),
    "legacy_ddp, bf16": Case((*HASH, *LEGACY, "--bf16"), tolerance=0.1),
    "pytorch_ddp, bf16": Case((*HASH, *TORCH, "--bf16"), tolerance=0.1),
    "pytorch_ddp, fp16 flattened": Case((*HASH, *TORCH, "--fp16"), tolerance=0.1),
    "shared, legacy_ddp": Case((*HASH, *LEGACY), SHARED),
    "shared, pytorch_ddp": Case((*HASH, *TORCH), SHARED),
    "shared, bf16": Case((*HASH, *LEGACY, "--bf16"), SHARED, 0.1),
    "shared, fp16": Case((*HASH, *LEGACY, "--fp16", "--fp16-no-flatten-grads"), SHARED, 0.1),
    "shared, fairscale's layer": Case((*HASH, *LEGACY, "--expert-dispatch", "fairscale"), SHARED),
}
SWITCHES = {
    "switch, legacy_ddp": Case((*SWITCH, *LEGACY)),
    "switch, shared": Case((*SWITCH, *LEGACY), SHARED),
    "switch, shared, fairscale's layer": Case((*SWITCH, *LEGACY, "--expert-dispatch", "fairscale"), SHARED),
}
ON_A_CPU = ("legacy_ddp", "pytorch_ddp", "shared, legacy_ddp")


def processes(cases, reference, device, data, folder):
    cases = {name: case for name, case in cases.items() if device.type == "cuda" or name in ON_A_CPU}
    return stop_and_go_on(data, device, folder, reference, cases)


@pytest.fixture(scope="module")
def hash_runs(device, data, tmp_path_factory):
    """Hash without a process group, with one, and from where it saved."""
    return processes(CASES, HASH, device, data, tmp_path_factory.mktemp("hash"))


@pytest.fixture(scope="module")
def switch_runs(device, data, tmp_path_factory):
    """Switch, the same."""
    if device.type == "cpu":
        pytest.skip("on the CPU a few cases show that the test works")
    return processes(SWITCHES, SWITCH, device, data, tmp_path_factory.mktemp("switch"))


@pytest.mark.parametrize("name", CASES)
def test_hash_trains_as_without_a_group(hash_runs, device, name):
    if device.type == "cpu" and name not in ON_A_CPU:
        pytest.skip("on the CPU a few cases show that the test works")
    assert_as_without_a_group(hash_runs, name, CASES[name])


@pytest.mark.parametrize("name", SWITCHES)
def test_switch_trains_as_without_a_group(switch_runs, name):
    assert_as_without_a_group(switch_runs, name, SWITCHES[name])


def test_fairscales_layer_is_refused_where_one_rank_has_all_experts(device, data, tmp_path):
    words = train(data, device, tmp_path / "saved", 2, "--no-save", *HASH, "--expert-dispatch", "fairscale").words
    code, said = wait(launch(["-m", "fairseq_cli.train", *words[1:]], device, tmp_path / "said.txt"), device)
    assert code == 1 and "--expert-dispatch fairscale exchanges rows between ranks" in said, said[-2000:]
    assert "Traceback" not in said, said[-2000:]


def test_torchrun_with_one_process(device, data, tmp_path):
    words = train(data, device, tmp_path / "saved", 6, *HASH, *LEGACY, *backend(device)).words[1:]
    by_torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m", "fairseq_cli.train"]
    alone = ["-m", "fairseq_cli.train", *train(data, device, tmp_path / "alone", 6, "--no-save", *HASH).words[1:]]
    started = [
        launch([*by_torchrun, *words], device, tmp_path / "torchrun.txt"),
        launch(alone, device, tmp_path / "alone.txt"),
    ]
    outcomes = [wait(process, device) for process in started]
    for code, said in outcomes:
        assert code == 0, said[-2000:]
    assert_same_losses(*(numbers(said) for _, said in outcomes))
    assert (tmp_path / "saved" / "checkpoint_last.pt").is_file()
