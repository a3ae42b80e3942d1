"""How the tests on a GPU find out where the host waits for it."""

import contextlib
import traceback
import warnings
from pathlib import Path
from unittest import mock

import torch

import fairseq_hash

PACKAGE = str(Path(fairseq_hash.__file__).parent)
# What torch's own mode does not notice.
EXPLICIT = ((torch.cuda.Event, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.cuda, "synchronize"))


def _refuse(*_):
    raise AssertionError("waits for an event")


@contextlib.contextmanager
def none_allowed():
    """Fail where the host waits for the GPU. What is made once (a first try, a cache) has to be made before."""
    with contextlib.ExitStack() as stack:
        for owner, name in EXPLICIT:
            stack.enter_context(mock.patch.object(owner, name, _refuse))
        torch.cuda.set_sync_debug_mode("error")
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        yield


@contextlib.contextmanager
def recorded():
    """Give a list that, afterwards, has the file and line of each wait; of one in autograd, where it was started."""
    places = []

    def wait(original):
        def noted(*args, **kwargs):
            places.extend((f.filename, f.lineno) for f in traceback.extract_stack()[-2:-1])
            return original(*args, **kwargs)

        return noted

    with contextlib.ExitStack() as stack:
        for owner, name in EXPLICIT:
            stack.enter_context(mock.patch.object(owner, name, wait(getattr(owner, name))))
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        yield places
    places.extend((w.filename, w.lineno) for w in caught if "synchronizing CUDA operation" in str(w.message))


def in_package(places):
    """Return those of the package, as text."""
    return sorted(f"{file.removeprefix(PACKAGE)}:{line}" for file, line in places if file.startswith(PACKAGE))
