"""What the tests of the preparation share: fairseq-preprocess from the fork server."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest

from data_prep import binarize


class Forked:
    """In place of the process of `fairseq-preprocess`: one that need not import fairseq first, for 4 s."""

    def __init__(self, command, stdout, **streams):
        self.process = forked.start_python(command[1:], Path(stdout.name), Path(stdout.name))

    def wait(self):
        """Return its exit status when it has ended."""
        self.process.join()
        return self.process.exitcode

    def kill(self):
        """End it at once."""
        self.process.kill()


@pytest.fixture(autouse=True)
def preprocess_is_forked(monkeypatch):
    """Where a test calls the preparation in this process; its command in a process of its own starts the real one."""
    stand_in = SimpleNamespace(Popen=Forked, STDOUT=subprocess.STDOUT, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(binarize, "subprocess", stand_in)
