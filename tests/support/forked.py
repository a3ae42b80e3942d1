"""Processes that have torch and fairseq imported when they start: forked from one that has.

To import them takes several seconds, and the tests start hundreds of processes. multiprocessing's fork server imports
them once for a process of pytest; all else, the plugin included, each process does itself, as a command does.
"""

import atexit
import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing import forkserver, util
from pathlib import Path
from unittest import mock

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["fairseq.options", "fairseq.trainer", "fairseq.checkpoint_utils", "fairseq.tasks.language_modeling"]
# Each training imports these, in several seconds: fairseq says which data parallel it uses, torch makes an optimizer.
PRELOADED += ["torch.distributed.fsdp", "torch._dynamo"]


@functools.cache
def ensure_server():
    """Start the server; each process has one thread, which torch reads when it is imported."""
    CONTEXT.set_forkserver_preload(PRELOADED)
    as_told = mock.patch.object(util, "_args_from_interpreter_flags", list)  # not -B: conftest keeps bytecode
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"), as_told:
        forkserver.ensure_running()


def start(function, arguments, out, err=None, **environment):
    """Start a process that calls a function; what it says goes to one file, or two. Return the process."""
    ensure_server()
    out.touch()  # a reader may come before the process
    process = CONTEXT.Process(target=_call, args=(function, arguments, str(out), str(err or out), environment))
    process.start()
    return process


def _call(function, arguments, out, err, environment):
    """Be that process, as one that Python itself started."""
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)  # for children of its own
    # multiprocessing has ways of its own with errors and with the end.
    try:
        function(*arguments)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()


def start_python(words, out, err, cwd=None, **environment):
    """Start what `python WORDS` starts, `-m MODULE ...` or `FILE ...`; what it says goes to two files."""
    return start(_python, (list(map(str, words)), cwd and str(cwd)), out, err, **environment)


def _python(words, cwd):
    if cwd is not None:
        os.chdir(cwd)
    is_module = words[0] == "-m"
    sys.argv = words[1:] if is_module else words
    if is_module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def run_python(words, folder, timeout, **environment):
    """Return a finished process, with its output as text.

    Raises:
        subprocess.TimeoutExpired: it has not ended after so many seconds, and has been killed.
    """
    out, err = folder / "out", folder / "err"
    process = start_python(words, out, err, **environment)
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired(words, timeout, out.read_text(), err.read_text())
    return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())
