"""scripts/setup_steps.py: commands side by side, what is said of them, and what is left when one fails."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "setup_steps.py"


@pytest.fixture
def module(monkeypatch):
    spec = importlib.util.spec_from_file_location("setup_steps", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "EVERY", 0.2)
    return module


def python(text, *arguments):
    return [sys.executable, "-c", text, *map(str, arguments)]


def test_steps_are_said_and_commands_are_not(module, tmp_path, monkeypatch, capfd):
    said = []

    def say(text):
        """Remember a line; let the commands end once there is one of what both are doing."""
        said.append(text)
        if text.endswith("here: Collecting things; there: Collecting things"):
            (tmp_path / "go").touch()

    monkeypatch.setattr(module, "say", say)
    steps = module.Steps(tmp_path, tmp_path / "logs", 2)
    steps.run("the first thing", {"one": python("print('a word of one', flush=True)")})
    # They run side by side, or this has no end.
    waits = """
import time
from pathlib import Path
print("Collecting things", flush=True)
print("WARNING: this is said in passing", flush=True)
while not Path("go").exists():
    time.sleep(0.01)
"""
    steps.run("the second thing", {"here": python(waits), "there": python(waits)})
    assert capfd.readouterr() == ("", "")
    assert all(re.match(r"\[[12]/2\] +\d+ s  .", line) for line in said), said
    announced = [line for line in said if line.endswith("thing")]
    assert [re.sub(r" +\d+ s  ", " ", line) for line in announced] == [
        "[1/2] the first thing",
        "[2/2] the second thing",
    ]
    assert (tmp_path / "logs" / "one.txt").read_text() == "a word of one\n"


def test_a_failure_shows_the_end_and_ends_the_others(module, tmp_path, capfd):
    steps = module.Steps(tmp_path, tmp_path / "logs", 1)
    # SystemExit on SIGTERM, so that it can be seen that it was ended, and how.
    waits = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('ended', flush=True), sys.exit()))"
    )
    waits += "; open('ready', 'w').close(); time.sleep(600)"
    fails = """
import sys, time
from pathlib import Path
while not Path("ready").exists():
    time.sleep(0.01)
print(*range(30), sep="\\n")
sys.exit(3)
"""
    with pytest.raises(module.SetupError) as error:
        steps.run("two things", {"waits": python(waits), "fails": python(fails)})
    log = tmp_path / "logs" / "fails.txt"
    assert str(error.value) == f"the step `fails` failed; its last lines stand above, all are in {log}"
    shown = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("setup: ")]
    assert shown == [f"  {number}" for number in range(15, 30)]
    assert log.read_text().splitlines() == [str(number) for number in range(30)]
    assert (tmp_path / "logs" / "waits.txt").read_text() == "ended\n"
