"""How a training ended, or whether it seems to be running still; and whether an evaluation counts as its result."""

import re
from datetime import datetime
from pathlib import Path

from fairseq_hash.reporting.logs import Evaluation, TrainingLog, parse_line

# If a log grew within this time, in seconds, its training counts as running.
ALIVE = 600.0
ERROR = re.compile(r"(fairseq_hash: |\w[\w.]*(Error|Exception|Interrupt)\b|slurmstepd: error|Killed).*")


def why_not_done(training: TrainingLog, grown: float, error: "str | None", now: float) -> "str | None":
    """Return why a training is not done, None if it is.

    `grown` is when its log last grew, and `now` the current time, in seconds since 1970; `error` is the error with
    which its log ends (`last_error`).
    """
    if training.finished is not None:
        return None
    updates, stop = training.updates, training.config.get("optimization.max_update") or 0
    epochs = training.config.get("optimization.max_epoch") or 0
    where = f"at update {updates:,}" + (f" of {stop:,}" if stop else f" ({epochs} epochs are wanted)" if epochs else "")
    again = "its command, given again, goes on from its last checkpoint"
    if training.stopped_by:
        return f"its training was stopped by {training.stopped_by} {where}; {again}"
    if error:
        return f"its training failed {where}: {error}"
    if now - grown < ALIVE:
        return f"its training is {where}: its log grew {max(0, now - grown):.0f} s ago, so it seems to run still"
    since = f"its log has not grown since {datetime.fromtimestamp(grown):%Y-%m-%d %H:%M}"
    if 0 < stop <= updates:
        return f"its training did not end after update {updates:,}, its last one, and {since}; {again}"
    return f"its training broke off {where}, and {since}; {again}"


def last_error(path: Path) -> "str | None":
    """Return the error with which a log ends: a line of this project, else the last line of a traceback."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    end = next((place for place in range(len(lines), 0, -1) if parse_line(lines[place - 1])), 0)
    errors = [line.strip() for line in lines[end:] if ERROR.match(line)]
    return next((line for line in errors if line.startswith("fairseq_hash: ")), errors[-1] if errors else None)


def why_no_result(evaluation: Evaluation, training: TrainingLog) -> "str | None":
    """Return why an evaluation does not count as a result of a training, None if it counts."""
    config = evaluation.config
    again = f"repeat it with --tokens-per-sample {training.config.get('task.tokens_per_sample')}"
    if evaluation.perplexity is None:
        return f"has no result: {evaluation.error or 'its log ends without one'}"
    if evaluation.skipped:
        return f"left out {evaluation.skipped:,} samples that were too long for the model; {again}"
    if evaluation.tokens == 0:
        return f"scored no token; {again}"
    ranks = config.get("distributed_training.distributed_world_size")
    parts = max(config.get("dataset.num_shards") or 1, ranks or 1)
    if parts > 1:
        return f"scored one of {parts} parts of the text; repeat it in one process, without --num-shards"
    if training.finished is not None and evaluation.time < training.finished:
        return "was made before training was done; repeat it"
    models = {one.get("dictionary_fingerprint") for one in (evaluation.model, training.model) if one} - {None}
    if len(models) > 1:
        return "was made with another dictionary than the training"
    return None
