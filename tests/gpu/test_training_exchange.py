"""Two ranks on one card, over gloo: a sparse layer whose experts they share, against a loop over the tokens.

The rows go through the host, so this shows what the layer's own code does with CUDA tensors (streams, copies of split
sizes, empty groups), not how NCCL moves them. Where torch's gloo refuses CUDA tensors, the test is skipped with what it
says.
"""

import re
import time

import pytest

from gpu import one_card
from gpu.trainings import HERE, launch

TIMEOUT = {"cuda": 45, "cpu": 240}
REFUSED = re.compile(
    r".*(?:no support for CUDA|not support.*cuda|unsupported device|No backend type|only.*cpu).*", re.I
)


def start(device, folder, name):
    """Start both ranks of a check."""
    folder.mkdir()
    script, meeting = HERE / "one_card.py", folder / "meeting"
    return [launch([script, device.type, 2, rank, meeting, name], device, folder / f"{rank}.txt") for rank in range(2)]


@pytest.fixture(scope="module")
def said(device, tmp_path_factory):
    """What the ranks of each check said, and their exit codes."""
    folder = tmp_path_factory.mktemp("one card")
    names = one_card.CHECKS if device.type == "cuda" else ["layer"]
    started = {name: start(device, folder / name, name) for name in names}
    deadline = time.monotonic() + TIMEOUT[device.type]
    processes = [process for pair in started.values() for process in pair]
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in processes:  # one that has not ended has no end; its code is then -9
        process.kill()
        process.wait()
    return {name: [(one.returncode, one.out.read_text()) for one in pair] for name, pair in started.items()}


@pytest.mark.parametrize("name", one_card.CHECKS)
def test_two_ranks_on_one_card(said, device, name):
    if device.type == "cpu" and name not in said:
        pytest.skip("on the CPU one case shows that the test works")
    refused = [line for _, text in said[name] for line in REFUSED.findall(text) if "Error" in line]
    if refused and any(code for code, _ in said[name]):
        pytest.skip(f"gloo does not take CUDA tensors here: {refused[0].strip()[-300:]}")
    for rank, (code, text) in enumerate(said[name]):
        assert code == 0, f"rank {rank}: exit code {code}\n{text[-2000:]}"
