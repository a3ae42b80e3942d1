"""The demo's child processes, which never outlive it, and its progress on a terminal and elsewhere."""

import fcntl
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
# Says its process id, then holds a lock, as does what it starts; both would run for a minute.
HOLDER = """
import fcntl, os, signal, subprocess, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
for number in sys.argv[2:]:
    signal.signal(int(number), signal.SIG_IGN)
keep = {"pass_fds": [file.fileno()], "stdout": subprocess.DEVNULL}
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], **keep)
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def process(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("demo_process")


@pytest.fixture
def progress():
    return importlib.import_module("fairseq_hash.core.progress")


def python(program, *arguments):
    return [sys.executable, "-c", program, *map(str, arguments)]


def test_lines_go_to_the_log_and_on(process, tmp_path):
    """Both streams, in order, each line at once; in the folder and with the threads that were asked for."""
    log, lines = tmp_path / "a.log", []

    def on_line(line):
        lines.append(line)
        assert log.read_text() == "".join(lines)

    program = "import os, sys; print('one'); print('two', file=sys.stderr); print(os.getcwd())\n"
    program += "print(os.environ['OMP_NUM_THREADS']); print(sys.stdin.read() == ''); sys.stdout.buffer.write(b'\\xff')"
    process.run_logged(python(program), log, tmp_path, on_line)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert lines == ["one\n", "two\n", f"{os.path.realpath(tmp_path)}\n", f"{cores}\n", "True\n", "\ufffd"]


def test_a_log_is_continued_or_begun_anew(process, tmp_path):
    for append, expected in ((False, "1\n"), (True, "1\n2\n"), (False, "3\n")):
        process.run_logged(python(f"print({expected[-2]})"), tmp_path / "a.log", tmp_path, print, append=append)
        assert (tmp_path / "a.log").read_text() == expected


def test_a_failed_step_tells_its_last_lines(process, tmp_path):
    """Fifteen of them, long ones shortened, with the status and where the rest is."""
    program = "for i in range(40): print(i)\nprint('x' * 1000); raise SystemExit(7)"
    with pytest.raises(process.StepFailed) as caught:
        process.run_logged(python(program), tmp_path / "a.log", tmp_path, lambda line: None)
    last = f"The step failed with status 7; all of its output is in {tmp_path / 'a.log'}"
    assert str(caught.value).splitlines() == [*map(str, range(26, 40)), "x" * 300 + "...", last]
    assert len((tmp_path / "a.log").read_text().splitlines()) == 41


def test_a_step_killed_by_a_signal_failed(process, tmp_path):
    with pytest.raises(process.StepFailed, match="^The step failed with status -9; "):
        program = "import os; os.kill(os.getpid(), 9)"
        process.run_logged(python(program), tmp_path / "a.log", tmp_path, lambda line: None)


def is_free(lock):
    """Return whether the lock that a child and what it started hold is free at last: all of them have ended."""
    with lock.open() as file:
        for _ in range(200):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(0.05)
    return False


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
@pytest.mark.parametrize("ignored", [(), (signal.SIGTERM,)])
def test_whatever_ends_the_demo_ends_the_child(process, tmp_path, monkeypatch, error, ignored):
    """And what the child started; those that take no notice of SIGTERM are killed after a time."""
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.2 if ignored else 30)

    def on_line(line):
        seen.append(int(line))
        raise error("stop")

    seen = []
    with pytest.raises(error, match="stop"):
        command = python(HOLDER, tmp_path / "lock", *(int(number) for number in ignored))
        process.run_logged(command, tmp_path / "a.log", tmp_path, on_line)
    with pytest.raises(ProcessLookupError):
        os.kill(seen[0], 0)
    assert is_free(tmp_path / "lock")


def test_a_child_may_end_in_order(process, tmp_path):
    """SIGTERM comes first."""
    program = "import signal, sys, time; end = lambda *_: sys.exit(open('ended', 'w').close())\n"
    program += "signal.signal(signal.SIGTERM, end); print(flush=True); time.sleep(60)"
    with pytest.raises(ZeroDivisionError):
        process.run_logged(python(program), tmp_path / "a.log", tmp_path, lambda line: 1 / 0)
    assert (tmp_path / "ended").exists()


def test_a_terminated_demo_ends_its_child(tmp_path):
    """As demo.py arranges it: SIGTERM becomes an exit."""
    program = f"import sys, signal; sys.path.insert(0, {str(SCRIPTS)!r})\n"
    program += "import demo_process; from pathlib import Path\n"
    program += "signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))\n"
    program += "show = lambda line: print(line, flush=True)\n"
    program += "demo_process.run_logged(sys.argv[1:], Path('a.log'), Path('.'), show)\n"
    command = python(program, *python(HOLDER, tmp_path / "lock"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as demo:
        child = int(demo.stdout.readline())
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert is_free(tmp_path / "lock")


def test_ctrl_c_reaches_the_demo_only(process, tmp_path):
    """The child is in a session of its own, so a terminal's signal does not reach it; the demo ends it in order."""
    lines = []
    program = "import os; print(os.getsid(0), os.getpid())"
    process.run_logged(python(program), tmp_path / "a.log", tmp_path, lines.append)
    session, child = map(int, lines[0].split())
    assert session == child != os.getsid(0)


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False, soft_wrap=True)


def play(progress, terminal):
    """Return what is shown of three steps: one done before, one with ten advances, one with none."""
    shown = console(terminal)
    with progress.Display(100, shown) as display:
        display.skip("data", 20)
        display.begin("a [b]", 60)
        for tenth in range(1, 11):
            display.advance(tenth / 10, f"update {tenth}")
        display.end("done [c]")
        display.begin("evaluation", 20)
        display.end("perplexity 5")
        left = [display.bars.tasks[0].completed, display.bars.tasks[0].total, len(display.bars.tasks)]
    return shown.file.getvalue(), left


def test_progress_elsewhere_is_a_line_now_and_then(progress):
    """About five lines a step with the time left, and no control characters: this goes to files."""
    text, _ = play(progress, terminal=False)
    text = re.sub(r"begins after \d+ s|about \d+ min left", "TIME", text)
    lines = text.splitlines()
    assert lines[:2] == ["data: done before", "a [b]: TIME"] and "\x1b" not in text
    told = [line for line in lines if "update" in line]
    assert 4 <= len(told) <= 5 and all(re.fullmatch(r"  a \[b\]: update \d+, TIME", line) for line in told)
    assert lines[-3:] == ["a [b]: done [c]", "evaluation: TIME", "evaluation: perplexity 5"]


def test_progress_on_a_terminal_is_bars(progress):
    """The whole and the current step, with results above them and no line for every advance."""
    text, _ = play(progress, terminal=True)
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)
    assert re.search(r"In all .*\d+%", plain) and "━" in plain and "\x1b" in text
    assert "a [b]: done [c]" in plain and "data: done before" in plain and not re.search("begins|min left", plain)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_of_the_whole_fills(progress, terminal):
    """What was done before is no work; at the end all of it is done, and the bars of the steps are gone."""
    assert play(progress, terminal)[1] == [80, 80, 1]


def test_the_time_left_is_in_proportion(progress, monkeypatch):
    """60 s for 25 of 100: three more minutes."""
    shown = console(False)
    with progress.Display(100, shown) as display:
        display.start = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: 1060.0)
        display.begin("a", 50)
        display.advance(0.5, "half")
        display.end("done")
        display.begin("b", 50)
    lines = ["a: begins after 60 s", "  a: half, about 3 min left", "a: done", "b: begins after 60 s"]
    assert shown.file.getvalue().splitlines() == lines


def test_a_slow_step_tells_where_it_is_every_half_minute(progress, monkeypatch):
    """Also where that is less than a fifth of it; the time left is told when there is something to tell it by."""
    shown, now = console(False), [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Display(100, shown) as display:
        display.begin("a", 100)
        for place in range(1, 9):
            now[0] += 10
            display.advance(place / 400, f"update {place}")
    assert shown.file.getvalue().splitlines() == [*("a: begins after 0 s", "  a: update 3", "  a: update 6")]
