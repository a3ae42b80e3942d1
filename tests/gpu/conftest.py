"""What the tests on a GPU share: the marker `gpu`, and the device that they run on."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
LAST_LINES = 30


def pytest_collection_modifyitems(items):
    """Mark every test of this folder, and let those begin first that take longest."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")
    items.sort(key=lambda item: HERE in item.path.parents and "training" not in item.path.name)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    """Say at once what failed: a run may be cut off before its end."""
    if report.failed and HERE.name in report.nodeid:
        lines = report.longreprtext.splitlines()
        print("", f"FAILED {report.nodeid}", *lines[-LAST_LINES:], sep="\n", flush=True)


@pytest.fixture(scope="session")
def device(request):
    """The torch.device under test; without one, the tests that ask for it are skipped."""
    name = request.config.getoption("--gpu-device")
    if name is None and not torch.cuda.is_available():
        pytest.skip("no GPU; --gpu-device cpu runs them small on the CPU")
    return torch.device(name or "cuda")


@pytest.fixture
def cuda(device):
    """The torch.device under test, for what only a GPU has."""
    if device.type != "cuda":
        pytest.skip("only a GPU has this")
    return device
