"""What all tests share."""

import logging
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

LONG = {"end_to_end", "scripts", "studies", "training", "checkpoint", "data_prep", "benchmarks"}
pytest_plugins = ["file_server", "made_runs", "slurm_jobs"]

if sys.dont_write_bytecode:
    # Each of some hundred processes would compile torch and fairseq anew, for 10 s. Kept in a folder of pytest's own,
    # their bytecode still does not lie beside the sources. Set before torch is imported, and for all children.
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
# No timed assertions: speed lives in benchmarks/. The examples are the same in every run.
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")


def pytest_configure():
    """Give each test process one thread: several of them, and their commands, must not fight for cores."""
    import torch

    torch.set_num_threads(1)


def pytest_xdist_auto_num_workers():
    """Return one process more than there are cores: while one waits for time to pass, all cores have work."""
    return (os.cpu_count() or 1) + 1  # --maxprocesses limits it


def pytest_addoption(parser):
    """Declare what tests/gpu asks for; pytest reads options from here only."""
    parser.addoption("--gpu-device", choices=("cpu", "cuda"), help="what tests/gpu runs on (default: cuda, or skip)")


def pytest_collection_modifyitems(items):
    """Let the folders begin first whose tests train or install: the last worker would be alone with them at the end."""
    items.sort(key=lambda item: LONG.isdisjoint(item.path.parts))


@pytest.fixture(autouse=True)
def process_is_left_as_it_was():
    """Give back what a test, or a command that it calls, changes of this process, so that no test depends on others."""
    root = logging.getLogger()
    disabled, level, handlers = logging.root.manager.disable, root.level, root.handlers.copy()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    signals = {number: signal.getsignal(number) for number in numbers}
    environment = os.environ.copy()
    yield
    logging.disable(disabled)
    root.setLevel(level)
    root.handlers[:] = handlers
    for number, handler in signals.items():
        signal.signal(number, handler)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    if "fairseq.logging.metrics" in sys.modules:
        sys.modules["fairseq.logging.metrics"].reset()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The small corpus of `made_corpus`, in a folder with a space."""
    import made_corpus

    return made_corpus.make_corpus(tmp_path_factory.mktemp("a corpus"))


@pytest.fixture
def dictionary(tmp_path):
    """A dictionary of five words with their counts."""
    import called

    return called.write_dictionary(tmp_path / "dict.txt", (50, 30, 20, 10, 7))
