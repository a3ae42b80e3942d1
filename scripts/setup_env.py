#!/usr/bin/env python3
"""Make the environment of this project in `.venv`, or make it anew where it is not whole (run by scripts/setup.sh).

An environment counts as whole when its state file says that it was completed in this folder for these requirements,
its Python runs, and every file that pip installed is there. Anything else is thrown away and made anew: pip's cache
and the kept fairseq wheel make that quick, and no half-repaired state can arise.
"""

import argparse
import csv
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import build_fairseq
from setup_steps import SetupError, Steps, say

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STATE = VENV / "setup.json"
WHEELS = VENV / "wheels"
KEPT = {"lock", "in-use", STATE.name, WHEELS.name}
PINS = ROOT / "scripts" / "pins-py311.txt"
WHY = re.compile(r"^[ \t]*# Why: .*\n", re.MULTILINE)  # the reason of a pin or a bound, beside it
PINNED_PYTHON = (3, 11)  # on which all tests run before a commit; pins for each Python would be tested by nobody
TORCH = "2.13.0"  # with which the whole project was tested, and all of its results were made
OLDEST_TORCH = (2, 11)  # the oldest that was tried (docs/install.md)
DISK_GB = 3  # the environment with a CPU build of torch takes 1.7 GB


def requirements() -> str:
    """Return a hash of everything in the project that decides what is installed."""
    version = re.search(r'^__version__ = "(.+)"', (ROOT / "fairseq_hash" / "provenance.py").read_text(), re.MULTILINE)
    project, _, _ = (ROOT / "pyproject.toml").read_text().partition("\n[tool.ruff]")
    texts = (WHY.sub("", text) for text in (project, PINS.read_text()))
    parts = [version.group(1) if version else "", *texts, build_fairseq.VERSION, TORCH]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read_state() -> dict:
    """Return what the last set-up wrote, {} where there is nothing readable."""
    try:
        return json.loads(STATE.read_text())
    except (OSError, ValueError):
        return {}


def write_state(state: dict) -> None:
    """Write the state file, whole or not at all."""
    temporary = STATE.with_suffix(".tmp")
    temporary.write_text(json.dumps(state, indent=1))
    temporary.replace(STATE)


def use_chosen_python(state: dict) -> None:
    """Go on with the Python that .venv was made with, where PYTHON names none and that one still runs."""
    chosen = state.get("python")
    oldest, newest = build_fairseq.PYTHONS
    if os.environ.get("PYTHON") or not chosen or chosen == base_python():
        return
    if oldest <= (version_of(chosen) or (0, 0)) <= newest:
        os.environ["PYTHON"] = chosen  # at most once
        os.execv(chosen, [chosen, *sys.argv])


def base_python() -> str:
    """Return the path of this Python; inside an activated virtual environment, of the one it was made with."""
    # sys.executable may lie in the very folder that is thrown away.
    return os.path.realpath(sys._base_executable)


def torch_setting(state: dict) -> str:
    """Return the torch version asked for, now or when .venv was made; '' for the default."""
    torch = os.environ.get("FAIRSEQ_HASH_TORCH") or state.get("torch", "")
    if torch and not re.fullmatch(r"\d+(\.\d+)+", torch):
        raise SetupError(f"FAIRSEQ_HASH_TORCH={torch} is not a version; give one such as {TORCH}, or unset it")
    if torch and tuple(map(int, torch.split(".")[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise SetupError(f"FAIRSEQ_HASH_TORCH={torch} is too old; give {oldest} or later, or unset it")
    return torch


def version_of(python: "str | Path") -> "tuple[int, int] | None":
    """Return the version (major, minor) of a Python, None where it does not run."""
    try:
        command = [str(python), "-c", "import sys; print(*sys.version_info[:2])"]
        major, minor = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        return int(major), int(minor)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def site_packages() -> "Path | None":
    """Return the folder of the installed packages, None where there is not exactly one."""
    found = list(VENV.glob("lib/python3.*/site-packages"))
    return found[0] if len(found) == 1 else None


def installed() -> "list[str]":
    """Return the names of the metadata folders of all installed packages, such as `numpy-2.4.6.dist-info`."""
    site = site_packages()
    return sorted(path.name for path in site.glob("*.dist-info")) if site else []


def missing_file(packages: "list[str]") -> "str | None":
    """Return the first file of `packages` that pip recorded and that is no longer there, None where all are."""
    site = site_packages()
    if site is None:
        return "lib"
    for package in packages:
        record = site / package / "RECORD"
        if not record.is_file():
            return f"{package}/RECORD"
        with record.open(newline="", encoding="utf-8") as file:
            for path, *_ in csv.reader(file):
                if not path.endswith(".pyc") and not os.path.exists(os.path.join(site, path)):
                    return path
    return None


def problem(state: dict, torch: str) -> "str | None":
    """Return why the environment cannot be used as it is, None where it can."""
    if not state:
        return "there is none yet"
    if not state.get("complete"):
        return "the last set-up was not completed"
    if state.get("folder") != str(ROOT):
        return "the project folder was moved or copied"
    if state.get("python") != base_python():
        return f"it was made with another Python, {state.get('python')}"
    if state.get("torch") != torch:
        return f"it was made with torch {state.get('torch') or TORCH}"
    if state.get("requirements") != requirements():
        return "the requirements changed"
    if version_of(VENV / "bin" / "python") != sys.version_info[:2]:
        return "its Python no longer runs"
    missing = missing_file(state.get("packages", []))
    return f"{missing} is missing" if missing else None


def refuse_foreign() -> None:
    """Raise `SetupError` where .venv holds packages that this program did not install."""
    own = [name for name in installed() if not name.startswith(("pip-", "setuptools-", "wheel-"))]
    if not STATE.exists() and own:
        raise SetupError(f"{VENV} holds an environment that is not this project's; move it away or delete it")


def check_machine() -> None:
    """Raise `SetupError` or `BuildError` where something is missing that pip cannot install."""
    # Debian splits ensurepip out of Python; without it `python -m venv` fails half-way.
    if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
        raise SetupError(f"{base_python()} has no venv or ensurepip module; install it (python3-venv), or set PYTHON")
    if not fairseq_wheel():
        build_fairseq.require_toolchain()
    free = shutil.disk_usage(VENV).free / 1e9
    if free < DISK_GB:
        raise SetupError(f"{free:.1f} GB free for {VENV}; at least {DISK_GB} GB are needed")


def fairseq_wheel() -> "Path | None":
    """Return the fairseq wheel of this recipe and Python, None where it has not been built yet."""
    tag = "cp{}{}".format(*sys.version_info[:2])
    return next(WHEELS.glob(f"fairseq-{build_fairseq.VERSION}-{tag}-*.whl"), None)


def clear() -> None:
    """Remove everything in .venv but the locks, the state and the fairseq wheels."""
    for path in VENV.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def make(torch: str) -> None:
    """Make the environment from nothing."""
    python, venv_python = base_python(), VENV / "bin" / "python"
    state = {"complete": False, "folder": str(ROOT), "python": python, "torch": torch, "requirements": requirements()}
    write_state(state)
    clear()
    steps = Steps(ROOT, VENV / "logs", 3)
    steps.run(f"a virtual environment of {python}", {"venv": [python, "-m", "venv", VENV]})
    pinned = sys.version_info[:2] == PINNED_PYTHON and not torch
    # Python compiles a module when it is first imported: pip would compile all of them, one after another.
    install = [venv_python, "-m", "pip", "install", "--no-input", "--no-compile", "--progress-bar", "off"]
    install += ["--disable-pip-version-check", *(["-c", PINS.relative_to(ROOT)] if pinned else [])]
    commands = {"packages": [*install, f"torch=={torch or TORCH}", "-e", ".[test,sweeps]"]}
    text = f"torch {torch or TORCH} and the packages" + (f" pinned in {PINS.name}" if pinned else "")
    if not fairseq_wheel():
        commands["fairseq"] = [venv_python, ROOT / "scripts" / "build_fairseq.py", "--out", WHEELS]
        text += f"; beside it, a wheel of fairseq {build_fairseq.VERSION} is built"
    steps.run(text, commands)
    # A relative path: pip reads brackets, '#' and '%' in an argument as more than a path.
    wheel = f"./{fairseq_wheel().relative_to(ROOT)}"
    steps.run(f"fairseq {build_fairseq.VERSION} and what it needs", {"fairseq-install": [*install, wheel]})
    write_state({**state, "complete": True, "packages": installed()})


def lock(file: int, kind: int) -> bool:
    """Lock an open file; return False where `kind` says not to wait and another process holds it."""
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        return False
    except OSError:
        say("this file system has no locks; do not run two set-ups of this folder at once")
    return True


def set_up(in_use: int) -> None:
    """Make the environment unless it is whole; hold the open file `in_use` locked for those who use it."""
    with (VENV / "lock").open("a") as file:
        # Inherited by pip: where this program is killed, the next one waits until its pip is gone too.
        os.set_inheritable(file.fileno(), True)
        if not lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB):
            say("another set-up of this folder is running; waiting for it")
            lock(file.fileno(), fcntl.LOCK_EX)
        state = read_state()
        torch = torch_setting(state)
        reason = problem(state, torch)
        if reason:
            refuse_foreign()
            check_machine()
            # Three tries: the processes of a script that was just killed let go one after another.
            if not any(lock(in_use, fcntl.LOCK_EX | fcntl.LOCK_NB) or time.sleep(0.5) for _ in range(3)):
                raise SetupError(f".venv must be made anew ({reason}), but another script uses it; wait for its end")
            start = time.monotonic()
            say(f"making the environment in {VENV}: {reason}; this takes two to three minutes")
            make(torch)
            left = problem(read_state(), torch)
            if left:
                raise SetupError(f"the environment is not whole after the set-up: {left}; run again, or report it")
            say(f"the environment is ready after {time.monotonic() - start:.0f} s")
        lock(in_use, fcntl.LOCK_SH)


def main() -> int:
    """Command line; exit status 1 and one line on standard error where the environment cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--in-use", type=int, required=True, metavar="FD", help="open file to lock while .venv is used")
    arguments = parser.parse_args()
    # A plain SIGTERM would leave pip running on its own.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        use_chosen_python(read_state())
        set_up(arguments.in_use)
    except (SetupError, build_fairseq.BuildError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted; the next run makes the environment anew")
        return 130
    except OSError as error:
        say(f"{error}; make room or set permissions, then run again")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
