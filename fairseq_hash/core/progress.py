"""Progress of long work: bars on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Elsewhere than on a terminal: a line a fifth of a step, and one after so many seconds.
LINES_A_STEP = 5
SECONDS_A_LINE = 30.0
# An estimate of the time left waits for so much of the whole work: the first updates tell little.
LEAST_DONE = 0.02


class Display:
    """Shows the whole work and its current step, each step with its share of the work in units of the caller's."""

    def __init__(self, total: float, console: "Console | None" = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self.bars = Progress(
            *columns,
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.total, self.done = total, 0.0
        self.overall = self.bars.add_task("In all", total=total, detail="")
        self.current: Any = None  # the step's TaskID, while there is one
        self.start = time.monotonic()

    def __enter__(self) -> "Display":
        self.bars.start()
        return self

    def __exit__(
        self, kind: "type[BaseException] | None", error: "BaseException | None", trace: "TracebackType | None"
    ) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(text, markup=False)

    def skip(self, name: str, work: float) -> None:
        """A step was done in an earlier call."""
        self.say(f"{name}: done before")
        self.total -= work
        self.bars.update(self.overall, total=self.total)

    def begin(self, name: str, work: float) -> None:
        """A step begins."""
        self.name, self.work, self.share, self.told, self.told_at = name, work, 0.0, 0.0, time.monotonic()
        self.current = self.bars.add_task(name, total=work, detail="")
        if not self.console.is_terminal:
            self.say(f"{name}: begins after {time.monotonic() - self.start:.0f} s")

    def advance(self, share: float, detail: str) -> None:
        """The current step has come to a share (0 to 1) of its work."""
        self.share = share
        self.bars.update(self.current, completed=share * self.work, detail=detail)
        self.bars.update(self.overall, completed=self.done + share * self.work)
        now = time.monotonic()
        is_due = share - self.told >= 1 / LINES_A_STEP or now - self.told_at >= SECONDS_A_LINE
        if not self.console.is_terminal and is_due:
            self.told, self.told_at = share, now
            self.say(f"  {self.name}: {detail}{self._remaining()}")

    def detail(self, text: str) -> None:
        """Show a word on the current step, whose share of work is not known."""
        self.bars.update(self.current, detail=text)

    def end(self, result: str) -> None:
        """The current step is done."""
        self.done += self.work
        self.bars.update(self.overall, completed=self.done)
        self.bars.remove_task(self.current)
        self.say(f"{self.name}: {result}")

    def _remaining(self) -> str:
        done = self.done + self.share * self.work
        if done < LEAST_DONE * self.total:
            return ""
        return f", about {(time.monotonic() - self.start) * (self.total - done) / done / 60:.0f} min left"
