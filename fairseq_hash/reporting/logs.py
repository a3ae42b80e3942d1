"""Reads fairseq's logs line by line: a training log over all its sessions, and outputs of evaluations."""

import ast
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.json_text import depth_of, parse_object
from fairseq_hash.reporting.log_kinds import OF_EVALUATION, OPTIONS, RECORD, check_entries, check_statistics, require

# fairseq's own commands write the first form, Hydra's the second. The last header in a line counts: text before it was
# cut off when an earlier session was killed.
LINE = re.compile(
    r".*(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?: \| [A-Z]+ \| ([\w.]+) \| |,\d+\]\[([\w.]+)\]\[[A-Z]+\] - )(.*)",
)
# An oracle's result says that it is one (`fairseq_patches/eval_lm.py`).
NUMBER = r"([-+]?(?:\d[\d.]*(?:e[-+]?\d+)?|inf|nan))"
RESULT = rf"Loss \(base 2\): {NUMBER}, Perplexity(?: of an oracle, which sees the next token)?: {NUMBER}"
DEEPEST = 50  # brackets within each other in a configuration
MODEL_RECORD = "model_record | "
# Lines about omitted samples: of fairseq in an evaluation, of `fairseq_patches.lengths` in a training.
SKIPPED = r"(\d[\d,]{0,20}) samples have invalid sizes and will be skipped"
LEFT_OUT = r"[\d,]+ of [\d,]+ samples of (\S+), with .* and left out$"


@dataclass(frozen=True)
class Line:
    """One line of a log: time, logger (`train_inner` and `valid` are loggers, too), and text."""

    time: datetime
    source: str
    message: str


@dataclass
class TrainingLog:
    """A training over all its sessions. What a resumed session did again replaces the earlier entries.

    Attributes:
        configs: the configuration of every session, flat (`optimization.max_update`), in the order they ran.
        model: the model's record (fairseq_hash.model), None if the log has none.
        intervals: statistics of every log interval by its last update, numbers as int or float; those of every epoch if
            the training was shorter than a log interval.
        validations: statistics of every validation by its update, without their prefix `valid_`.
        wall_seconds: time over all sessions. A resumed session counts from its checkpoint on, so repeated work counts
            once.
        finished: when the training was done, None while it is not.
        stopped_by: the signal that ended the last session (`SIGTERM`), None if none did.
        dictionary_types: the number of the dictionary's symbols, fairseq's own included; None if the log has none.
        left_out_of: the texts (`train`, `valid`) from which samples were left out because they were too long.
    """

    configs: list[dict[str, Any]] = field(default_factory=list)
    model: "dict[str, Any] | None" = None
    intervals: dict[int, dict[str, Any]] = field(default_factory=dict)
    validations: dict[int, dict[str, Any]] = field(default_factory=dict)
    wall_seconds: float = 0.0
    finished: "datetime | None" = None
    stopped_by: "str | None" = None
    dictionary_types: "int | None" = None
    left_out_of: set[str] = field(default_factory=set)
    _epochs: dict[int, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)
    _started: "datetime | None" = field(default=None, repr=False, compare=False)  # of the last session
    _resumed: "tuple[datetime, float] | None" = field(default=None, repr=False, compare=False)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the last session."""
        return self.configs[-1]

    @property
    def updates(self) -> int:
        """The last update in the log."""
        return max([0, *self.intervals, *self.validations])

    def resume(self, update: int, time: datetime) -> None:
        """Forget what came after a checkpoint's update, and count time from there: fairseq's clock starts at 0 then."""
        self.rewind(update)
        walls = [values["wall"] for values in self.intervals.values() if "wall" in values]
        self._resumed = time, max(walls, default=0.0)

    def wall_at(self, time: datetime, logged: float) -> float:
        """Return the seconds of training at a time: those that fairseq logged, unless the session was resumed."""
        if self._resumed is None:
            return logged
        start, before = self._resumed
        return before + (time - start).total_seconds()

    def stop(self, signal: str, time: datetime) -> None:
        """A signal ended the session. Its time counts up to then, even if that is before its first logged line."""
        start, before = self._resumed or (self._started, 0.0)
        self.stopped_by, self.wall_seconds = signal, before + (time - start).total_seconds()

    def rewind(self, update: int) -> None:
        """Forget what came after an update: a session starts from there."""
        self.intervals = {number: values for number, values in self.intervals.items() if number <= update}
        self.validations = {number: values for number, values in self.validations.items() if number <= update}
        self._epochs = {number: values for number, values in self._epochs.items() if number <= update}


@dataclass
class Evaluation:
    """One output of fairseq-eval-lm.

    `perplexity` is None if it was stopped before its end; `error` is the error with which its log ends, if any;
    `skipped` is the number of samples that it left out.
    """

    config: dict[str, Any]
    time: datetime
    subset: str = ""
    checkpoint: str = ""
    model: "dict[str, Any] | None" = None
    tokens: int = 0
    skipped: int = 0
    loss_bits: "float | None" = None
    perplexity: "float | None" = None
    error: "str | None" = None


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a log file that a logger wrote, without a last line that was cut off.

    Raises `UserError` if the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a run folder whose logs you can read") from None
    return [line for line in map(parse_line, text.rpartition("\n")[0].splitlines()) if line is not None]


def parse_line(text: str) -> "Line | None":
    """Return a logger's line, None for any other text. Text before it, such as a rank, is left out."""
    found = LINE.match(text)
    if not found:
        return None
    time, source, hydra_source, message = found.groups()
    try:
        return Line(datetime.fromisoformat(time), source or hydra_source, message)
    except ValueError:  # no time, such as a second 61
        return None


def statistics(line: Line) -> dict[str, Any]:
    """Return the statistics in a line of `train_inner`, `valid` or `train`: numbers as such, without a prefix.

    Raises `ValueError` for a line that was cut off.
    """
    prefix = "" if line.source == "train_inner" else f"{line.source}_"
    values = {key.removeprefix(prefix): _number(value) for key, value in parse_object(line.message).items()}
    if "oracle_ppl" in values:  # the model's record says that it is an oracle
        values["ppl"] = values.pop("oracle_ppl")
    return values


def read_training(lines: Iterable[Line]) -> "TrainingLog | None":
    """Return the training in some lines, in order; None if there is none."""
    log = TrainingLog()
    evaluating = False  # an evaluation records its model, too
    for line in lines:
        if line.source == "fairseq_cli.train" and line.message.startswith("{"):
            log.configs.append(parse_config(line.message))
            log.finished, log.stopped_by, log._resumed, evaluating = None, None, None, False
            log._started = line.time
        elif line.source == "fairseq_cli.eval_lm":
            evaluating = True
        elif not log.configs:
            continue
        elif not evaluating and (record := _model_record(line)):
            log.model = record
        elif line.source == "fairseq.trainer" and line.message.startswith("No existing checkpoint found"):
            log.rewind(0)
        elif line.source == "fairseq.trainer" and (
            loaded := re.match(r"Loaded checkpoint .* @ (\d{1,18}) updates", line.message)
        ):
            log.resume(int(loaded[1]), line.time)
        elif not evaluating and (types := re.match(r"dictionary: (\d{1,18}) types", line.message)):
            log.dictionary_types = int(types[1])
        elif not evaluating and (text := re.match(LEFT_OUT, line.message)):
            log.left_out_of.add(text[1])
        elif stopped := re.match(r"stopped by (SIG\w+) at update", line.message):
            log.stop(stopped[1], line.time)
        elif line.source in ("train_inner", "valid", "train"):
            _add_statistics(log, line)
        elif line.message.startswith("done training"):
            log.finished = line.time
    log.intervals = log.intervals or log._epochs
    return log if log.configs else None


def _model_record(line: Line) -> "dict[str, Any] | None":
    """Return the model's record, None if a line holds none or only the start of one."""
    if line.source != "fairseq_hash.model" or not line.message.startswith(MODEL_RECORD):
        return None
    try:
        record = parse_object(line.message.removeprefix(MODEL_RECORD))
    except ValueError:
        return None
    check_entries("its model_record", record, RECORD)
    return record


def _add_statistics(log: TrainingLog, line: Line) -> None:
    try:
        values = statistics(line)
    except ValueError:
        return  # the process was killed while it wrote
    check_statistics(line.source, values)
    if "wall" in values:
        values["wall"] = log.wall_at(line.time, values["wall"])
    update = values.get("num_updates")
    if isinstance(update, int):
        of_source = {"train_inner": log.intervals, "valid": log.validations, "train": log._epochs}
        of_source[line.source][update] = values
    log.wall_seconds = values.get("wall", log.wall_seconds)


def read_evaluations(lines: Iterable[Line]) -> list[Evaluation]:
    """Return the evaluations in the lines of one file, in order."""
    found: list[Evaluation] = []
    for line in lines:
        if line.source == "fairseq_cli.eval_lm" and line.message.startswith("{"):
            config = parse_config(line.message)
            require("its configuration", config, OF_EVALUATION)
            checkpoint = Path(config["common_eval.path"] or "").name
            found.append(Evaluation(config, line.time, config["dataset.gen_subset"], checkpoint))
        elif found and (record := _model_record(line)):
            found[-1].model = record
        elif found and (skipped := re.match(SKIPPED, line.message)):
            found[-1].skipped += int(skipped[1].replace(",", ""))
        elif found and (tokens := re.match(r"Evaluated (\d[\d,]{0,20}) tokens", line.message)):
            found[-1].tokens = int(tokens[1].replace(",", ""))
        elif found and (result := re.match(RESULT, line.message)):
            found[-1].loss_bits, found[-1].perplexity = map(_float, result.groups())
    return found


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"an evaluation's result is {text}; give the log as fairseq-eval-lm wrote it") from None


def parse_config(text: str) -> dict[str, Any]:
    """Return the configuration that fairseq logs first, flat: `{"optimization.max_update": 300, ...}`.

    fairseq prints it like Python, except that choices have no quotes. Raises `UserError` for other text, and for
    one that has an option of another kind.
    """
    try:
        if depth_of(text) > DEEPEST:  # of which Python's parser says that memory is short
            raise ValueError("it is nested too deeply")
        config = dict(flat(_literal(ast.parse(text, mode="eval").body)))
        check_entries("its configuration", config, OPTIONS)
        return config
    except UserError:
        raise
    except (SyntaxError, ValueError, RecursionError):
        raise UserError(
            f"cannot read a configuration in a log: {text[:60]}...; give the log as fairseq wrote it"
        ) from None


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Dict):
        return {str(_literal(key)): _literal(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Namespace":
        return {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(value) for value in node.elts]
    if isinstance(node, ast.Name):
        return {"inf": math.inf, "nan": math.nan}.get(node.id, node.id)
    return ast.literal_eval(node)


def flat(value: Any, prefix: str = "") -> "Iterable[tuple[str, Any]]":
    """Return the entries of nested dictionaries, with keys like `optimization.max_update`."""
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))


def _number(value: Any) -> Any:
    """Fairseq writes most numbers as text."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return value
