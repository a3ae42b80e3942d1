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
import socket
import subprocess
import sys
import tempfile
import time
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
    for file in {out, err or out}:
        file.touch()  # a reader may come before the process
    process = CONTEXT.Process(target=_call, args=(function, arguments, str(out), str(err or out), environment))
    process.start()
    return process


def _call(function, arguments, out, err, environment):
    """Be that process, as one that Python itself started, in a session of its own."""
    os.setsid()
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)  # for children of its own
    # multiprocessing has ways of its own with errors and with the end.
    interrupted = False
    try:
        function(*arguments)
    except KeyboardInterrupt:
        interrupted = True
        sys.excepthook(*sys.exc_info())
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()
    if interrupted:  # it ends of the signal, so that a shell knows
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


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


def run_program(program, *arguments, timeout=300, **environment):
    """Return the finished process of a program's text in a Python that has torch imported, but no fairseq."""
    with tempfile.TemporaryDirectory(prefix="said ") as name:
        out, err = Path(name, "out"), Path(name, "err")
        process = start(_program, (program, list(map(str, arguments))), out, err, **environment)
        process.join(timeout)
        process.kill()
        process.join()
        return subprocess.CompletedProcess(program, process.exitcode, out.read_text(), err.read_text())


def _program(program, arguments):
    sys.argv = ["-c", *arguments]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("fairseq", "fairseq_cli", "fairscale")]:
        del sys.modules[name]
    main = sys.modules["__main__"] = type(sys)("__main__")
    exec(compile(program, "<string>", "exec"), main.__dict__)


def run_python(words, timeout=300, cwd=None, **environment):
    """Return the finished process of `python WORDS`, with its output as text.

    Raises:
        subprocess.TimeoutExpired: it has not ended after so many seconds, and has been killed.
    """
    return run_ranks([words], timeout, cwd, **environment)[0]


def run_ranks(commands, timeout=300, cwd=None, **environment):
    """Return the finished processes of several `python WORDS` that run at once, as a launcher starts them.

    Several ones have its environment, too: RANK, WORLD_SIZE, where they meet.

    Raises:
        subprocess.TimeoutExpired: not all have ended after so many seconds; they have been killed.
    """
    environments = [environment] * len(commands)
    if len(commands) > 1:
        environments = [environment | more for more in _launched(len(commands))]
    with tempfile.TemporaryDirectory(prefix="said ") as name:
        files = [(Path(name, f"{rank}.out"), Path(name, f"{rank}.err")) for rank in range(len(commands))]
        processes = [
            start_python(words, out, err, cwd, **own)
            for words, (out, err), own in zip(commands, files, environments, strict=True)
        ]
        deadline = time.monotonic() + timeout
        try:
            for process in processes:
                process.join(max(deadline - time.monotonic(), 0))
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        said = [(out.read_text(), err.read_text()) for out, err in files]
    if None in codes:
        raise subprocess.TimeoutExpired(commands, timeout, str(said))
    ended = zip(commands, codes, said, strict=True)
    return [subprocess.CompletedProcess(words, code, out, err) for words, code, (out, err) in ended]


def _launched(world_size):
    """Return the environment that torchrun gives each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    world = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), **meeting}
    return [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
