"""torchrun with one process, and what is refused where one rank holds all experts."""

import pytest

from gpu.one_rank import backend
from gpu.trainings import HASH, assert_same_losses, launch, numbers, skip_long, train, wait

BY_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")
TRAIN = ("-m", "fairseq_cli.train")


@pytest.fixture(scope="module")
def outcomes(device, data, tmp_path_factory):
    """Exit codes and what was said: by torchrun, without it, and with fairscale's layer."""
    skip_long(device)
    folder = tmp_path_factory.mktemp("torchrun")
    group = ("--ddp-backend", "legacy_ddp", *backend(device))
    jobs = {
        "torchrun": train(data, device, folder / "saved", 6, *HASH, *group),
        "alone": train(data, device, folder / "alone", 6, "--no-save", *HASH),
        "fairscale": train(data, device, folder / "no", 2, "--no-save", *HASH, "--expert-dispatch", "fairscale"),
    }
    started = {
        name: launch(
            [*(BY_TORCHRUN if name == "torchrun" else ()), *TRAIN, *job.words[1:]], device, folder / f"{name}.txt"
        )
        for name, job in jobs.items()
    }
    return folder, {name: wait(process, device) for name, process in started.items()}


def test_torchrun_with_one_process(outcomes):
    folder, found = outcomes
    for code, said in (found["torchrun"], found["alone"]):
        assert code == 0, said[-2000:]
    assert_same_losses(numbers(found["torchrun"][1]), numbers(found["alone"][1]))
    assert (folder / "saved" / "checkpoint_last.pt").is_file()


def test_fairscales_layer_is_refused_where_one_rank_has_all_experts(outcomes):
    code, said = outcomes[1]["fairscale"]
    assert code == 1 and "--expert-dispatch fairscale exchanges rows between ranks" in said, said[-2000:]
    assert "Traceback" not in said, said[-2000:]
