"""Progress of a study: a line when a run begins and ends, bars on a terminal, and the time left."""

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fairseq_hash.reporting.logs import parse_line, statistics
from fairseq_hash.studies.definition import Study
from fairseq_hash.studies.records import RunRecord
from fairseq_hash.studies.schedule import FINAL, Done, Run, expected_runs
from fairseq_hash.studies.worker import TRAIN_LOG

TAIL_BYTES = 2**17  # a line holds the loads of all experts
SECONDS_A_LINE = 60.0


class StudyProgress:
    """Tells of a study's runs as they go."""

    def __init__(self, study: Study, done: Done, jobs: int, console: "Console | None" = None) -> None:
        self.study, self.jobs, self.finished = study, jobs, len(done)
        self.console = console or Console(highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self.bars = Progress(
            *columns,
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.total = max(expected_runs(study), self.finished)
        self.overall = self.bars.add_task(study.name, total=self.total, completed=self.finished, detail="")
        self.tasks: dict[Run, tuple[TaskID, Path, float]] = {}
        self.seconds: list[float] = []
        self.told_at = time.monotonic()

    def __enter__(self) -> "StudyProgress":
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def began(self, run: Run, folder: Path) -> None:
        """A run begins."""
        task = self.bars.add_task(describe(run), total=1.0, detail="")
        self.tasks[run] = task, folder / TRAIN_LOG, time.monotonic()
        self._say(f"{describe(run)}: begins")

    def ended(self, run: Run, record: RunRecord) -> None:
        """A run has its record."""
        self.seconds.append(self._close(run))
        self.finished += 1
        self.total = max(self.total, self.finished)
        self.bars.update(self.overall, completed=self.finished, total=self.total)
        result = f"diverged ({record.diverged})" if record.diverged else f"valid {record.valid_nats:.4f} nats per token"
        self._say(f"{describe(run)}: {result}, {self.seconds[-1]:.0f} s; {self._left()}")

    def failed(self, run: Run, why: str) -> None:
        """A run ended without a record."""
        self._close(run)
        self._say(f"{describe(run)}: failed: {why}")

    def look(self, done: Done) -> None:
        """Show how far the runs are."""
        is_due = time.monotonic() - self.told_at >= SECONDS_A_LINE
        if not self.console.is_terminal and not is_due:
            return
        shares = []
        for run, (task, log, _) in self.tasks.items():
            share, detail = how_far(log, self.study.text.train_tokens)
            self.bars.update(task, completed=share, detail=detail)
            shares.append(f"{describe(run)} {share:.0%}")
        if is_due and not self.console.is_terminal:
            self._say(f"  {'; '.join(shares)}")

    def _close(self, run: Run) -> float:
        task, _, began = self.tasks.pop(run)
        self.bars.remove_task(task)
        return time.monotonic() - began

    def _left(self) -> str:
        left = self.total - self.finished
        hours = left * sum(self.seconds) / len(self.seconds) / self.jobs / 3600
        return f"{self.finished} of about {self.total} runs, about {hours:.1f} hours left"

    def _say(self, text: str) -> None:
        self.told_at = time.monotonic()
        self.console.print(text, markup=False)


def describe(run: Run) -> str:
    """Return a run as words."""
    what = f"seed {run.seed}" if run.stage == FINAL else "tuning"
    return f"{run.model}, {what}, rate {run.learning_rate:g}"


def how_far(log: Path, tokens: int) -> tuple[float, str]:
    """Return the share of a training that is done, by the end of its log, and its perplexity."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return 0.0, ""
    for text in reversed(lines):
        line = parse_line(text)
        if line is not None and line.source == "train_inner":
            try:
                values = statistics(line)
            except ValueError:
                continue
            done = values["num_updates"] * values["wpb"]
            return min(1.0, done / tokens), f"perplexity {values.get('ppl', 0.0):.1f}, {values['wps']:,.0f} tokens/s"
    return 0.0, ""
