"""Child processes of the demo: logged line by line, ended with it, and explained where they fail."""

import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from fairseq_hash.provenance import usable_cores

LAST_LINES = 15
GRACE_SECONDS = 10


class StepFailed(Exception):
    """A child failed; the message holds its last lines and where its log is."""


def run_logged(
    command: Sequence[str], log: Path, folder: Path, on_line: Callable[[str], None], append: bool = False
) -> None:
    """Run a command in a folder, write its output to a log and hand on each line.

    The child gets as many threads as this process has cores. Whatever ends this function early ends the child, too.

    Raises `StepFailed` where the command does not end with status 0.
    """
    environment = {"OMP_NUM_THREADS": str(usable_cores()), "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    last: deque[str] = deque(maxlen=LAST_LINES)
    with log.open("a" if append else "w", encoding="utf-8") as file:
        # A session of its own: Ctrl-C reaches this process only, which then ends the child in an orderly way.
        piped = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | environment,
            **piped,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            for line in child.stdout:
                file.write(line)
                file.flush()
                last.append(line if len(line) < 300 else f"{line[:300]}...\n")
                on_line(line)
            status = child.wait()
        finally:
            end(child)
    if status != 0:
        raise StepFailed(f"{''.join(last)}The step failed with status {status}; all of its output is in {log}")


def end(child: "subprocess.Popen[str]") -> None:
    """End a child and what it started; nothing happens where it has ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is not None:
            break
        os.killpg(child.pid, number)
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    child.stdout.close()
