"""The steps of the set-up: commands that write to files in .venv/logs, and plain lines that say how far they are."""

import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

EVERY = 10  # seconds between two lines about one step
LAST = 15  # lines that are shown of a command that failed
WIDTH = 100  # columns of a line about running commands
ASIDE = ("WARNING", "DEPRECATION", "Attempting", "Found", "Uninstalling", "Successfully")  # what pip says in passing


class SetupError(Exception):
    """A reason why the environment cannot be made, in one line that says what to do."""


def say(text: str) -> None:
    """Print a line of progress on standard error, which leaves standard output to the script's own command."""
    print(f"setup: {text}", file=sys.stderr, flush=True)


class Steps:
    """Steps of one set-up, `count` in all, each with the seconds since it began.

    Commands are run in `folder`; the output of the command NAME goes to NAME.txt in `logs`, which the first step makes.
    """

    def __init__(self, folder: Path, logs: Path, count: int) -> None:
        self.folder, self.logs, self.count, self.number = folder, logs, count, 0
        self.start = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line of the present step."""
        say(f"[{self.number}/{self.count}] {time.monotonic() - self.start:3.0f} s  {text}")

    def run(self, text: str, commands: Mapping[str, Sequence["str | Path"]]) -> None:
        """Announce the next step and run its commands side by side.

        Raises:
            SetupError: where one fails, after the end of what it said; the others are ended.
        """
        self.number += 1
        self.say(text)
        self.logs.mkdir(exist_ok=True)
        running: dict[str, subprocess.Popen] = {}
        try:
            for name, command in commands.items():
                with self.log(name).open("wb") as log:
                    # It inherits the locks: as long as it runs, no other set-up starts.
                    running[name] = subprocess.Popen(
                        list(map(str, command)),
                        cwd=self.folder,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        close_fds=False,
                    )
            self._wait(running)
        finally:
            for process in running.values():
                if process.poll() is None:
                    process.terminate()
                    process.wait()

    def log(self, name: str) -> Path:
        """Return the file that holds what a command said."""
        return self.logs / f"{name}.txt"

    def _wait(self, running: Mapping[str, subprocess.Popen]) -> None:
        said = time.monotonic()
        while busy := [name for name, process in running.items() if process.poll() is None]:
            self._check(running)
            if time.monotonic() - said > EVERY:
                said = time.monotonic()
                text = "; ".join(f"{name}: {self._now(name)}" for name in busy)
                self.say(textwrap.shorten(text, WIDTH, placeholder=" ..."))
            time.sleep(0.05)
        self._check(running)

    def _check(self, running: Mapping[str, subprocess.Popen]) -> None:
        for name, process in running.items():
            if process.poll():
                for line in self.log(name).read_text(errors="replace").splitlines()[-LAST:]:
                    print(f"  {line}", file=sys.stderr)
                raise SetupError(f"the step `{name}` failed; its last lines stand above, all are in {self.log(name)}")

    def _now(self, name: str) -> str:
        """Return the last line of what a command said, but for what it said in passing."""
        lines = [line.strip() for line in self.log(name).read_text(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line and not line.startswith(ASIDE)), "starting")
