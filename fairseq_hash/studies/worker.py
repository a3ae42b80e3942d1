"""One run of a study, in a process of its own: training, scores on test, record.

A request, a JSON file in the run's folder, says all of it, so that the same command serves here and as a SLURM job.
"""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import only_one, write_json
from fairseq_hash.provenance import provenance, usable_cores
from fairseq_hash.studies.records import RunFacts, RunRecord, Scores, Validation, write_record

REQUEST, TRAIN_LOG, ERROR = "request.json", "train.log", "error.txt"
DIVERGED = "FloatingPointError"  # what fairseq raises for gradients that are no numbers


@dataclass(frozen=True)
class Request(RunFacts):
    """What a worker is to do.

    Attributes:
        folder: of the run.
        command: of the training.
        record: the file to write.
        tokens_per_update: of the training.
        data: folder of the binarized data.
        data_fingerprint: of that folder.
        evaluations: options of the model by the name of the evaluation on test; {} for none.
        threads: of the training; None for one on each core that the worker may use, as in a SLURM job.
    """

    folder: str
    command: list[str]
    record: str
    tokens_per_update: int
    data: str
    data_fingerprint: str
    evaluations: Mapping[str, Mapping[str, Any]]
    threads: "int | None"

    @property
    def threads_here(self) -> int:
        """Threads of a training on this machine."""
        return self.threads or usable_cores()


def write_request(request: Request) -> Path:
    """Write a request into its run's folder, which is made if it is missing."""
    folder = Path(request.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REQUEST, asdict(request))
    return folder / REQUEST


def worker_command(request: Path) -> list[str]:
    """Return the command that does what a request says."""
    return [sys.executable, "-m", "fairseq_hash.studies.worker", str(request)]


def main() -> int:
    """Do what the request says that the command line names. A failure leaves one line in the folder's error.txt."""
    request = Request(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    folder = Path(request.folder)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with only_one(folder, f"{folder} is being trained by another process; wait for its end"):
            (folder / ERROR).unlink(missing_ok=True)
            write_record(Path(request.record), make_record(request))
    except (UserError, OSError) as error:
        return _fail(folder, str(error))
    except KeyboardInterrupt:
        return 130
    return 0


def _interrupt(_number: int, _frame: "FrameType | None") -> None:
    raise KeyboardInterrupt


def _fail(folder: Path, line: str) -> int:
    (folder / ERROR).write_text(line + "\n", encoding="utf-8")
    print(line, file=sys.stderr)
    return 1


def make_record(request: Request) -> RunRecord:
    """Train, score and return the record.

    Raises:
        UserError: if the training fails other than by its loss.
    """
    folder = Path(request.folder)
    write_json(
        folder / "run.json",
        {
            "commands": {"train": request.command},
            "data": request.data,
            "data_fingerprint": request.data_fingerprint,
        },
    )
    record = _of_training(request, train(request))
    if request.evaluations and not record.diverged:
        record = replace(record, test=scores_on_test(request))
    for path in folder.glob("checkpoint_*_*.pt"):  # kept while it could have been resumed
        path.unlink()
    return record


def train(request: Request) -> str:
    """Run the training; a finished one is not repeated, one that was stopped goes on. Return why it diverged, or ""."""
    folder = Path(request.folder)
    log = folder / TRAIN_LOG
    if _is_finished(folder):
        return ""
    environment = {"OMP_NUM_THREADS": str(request.threads_here), "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    with log.open("ab") as file:
        # A session of its own: Ctrl-C reaches the study only, which ends its workers, and they their trainings.
        child = subprocess.Popen(
            request.command,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = child.wait()
        except KeyboardInterrupt:
            # It writes a checkpoint and ends. SIGINT would be ignored in a shell's background.
            child.send_signal(signal.SIGUSR1)
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                child.kill()
            raise
    if status == 0 and _is_finished(folder):
        return ""
    from fairseq_hash.reporting.endings import last_error

    error = last_error(log) or f"status {status}"
    if error.startswith(DIVERGED):
        return error
    raise UserError(f"the training of {folder} failed: {error} (all of it: {log})")


def _is_finished(folder: Path) -> bool:
    from fairseq_hash.reporting.runs import load_run

    try:
        return load_run(folder).training.finished is not None and (folder / "checkpoint_last.pt").is_file()
    except UserError:  # no log yet
        return False


def _of_training(request: Request, diverged: str) -> RunRecord:
    from fairseq_hash.reporting.comparison_table import measure
    from fairseq_hash.reporting.runs import load_run

    run = load_run(Path(request.folder))
    intervals = sorted(run.training.intervals.items())
    updates = [update for update, _ in intervals]
    walls = [values.get("wall", 0.0) for _, values in intervals]
    validations = [
        Validation(
            update * request.tokens_per_update,
            float(np.interp(update, updates, walls)) if updates else 0.0,
            values["nll_loss"] * float(np.log(2)),
        )
        for update, values in sorted(run.training.validations.items())
    ]
    if not diverged and not all(math.isfinite(one.nats) for one in validations):
        diverged = "its loss on valid is no number"  # while its gradients were, or fairseq would have stopped it
    row = measure(request.model, run) if intervals else {}
    return RunRecord(
        **{of.name: getattr(request, of.name) for of in fields(RunFacts)},
        tokens=run.training.updates * request.tokens_per_update,
        seconds=run.training.wall_seconds,
        tokens_per_second=float(row.get("tokens_per_second", 0.0)),
        validations=[one for one in validations if math.isfinite(one.nats)],
        diverged=diverged,
        load_max=_number(row.get("load_max_valid")),
        dropped=_number(row.get("dropped")),
        provenance=provenance(),
    )


def _number(value: Any) -> "float | None":
    return None if value is None or not np.isfinite(value) else float(value)


def scores_on_test(request: Request) -> dict[str, Scores]:
    """Score test once for each evaluation, with the model as it was at the training's end."""
    import torch

    from fairseq_hash.hashing.dictionary import read_dictionary
    from fairseq_hash.reporting.runs import load_run
    from fairseq_hash.studies.measures import by_document, by_frequency, by_position, documents, frequency_edges
    from fairseq_hash.studies.scores import token_nats
    from fairseq_hash.table_tools.token_streams import open_text

    torch.set_num_threads(request.threads_here)
    data = Path(request.data)
    config = load_run(Path(request.folder)).training.config
    symbols, _ = read_dictionary(data / "dict.txt")
    id_S, train_S = (np.concatenate(list(open_text(data, split, symbols).blocks())) for split in ("test", "train"))
    counts = np.bincount(train_S, minlength=len(symbols))
    document_S, _ = documents(id_S)
    edges, _ = frequency_edges(counts)
    scores = {}
    for name, options in request.evaluations.items():
        checkpoint = Path(request.folder) / "checkpoint_last.pt"
        nats_S = token_nats(checkpoint, data, "test", config["dataset.max_tokens"], options).astype(np.float64)
        position_nats, position_tokens = by_position(nats_S, config["task.tokens_per_sample"])
        scores[name] = Scores(
            nats=float(nats_S.mean()),
            position_nats=_rounded(position_nats),
            position_tokens=position_tokens.tolist(),
            frequency_nats=_rounded(by_frequency(nats_S, id_S, counts, edges)[0]),
            document_nats=_rounded(by_document(nats_S, document_S)[0]),
        )
    return scores


def _rounded(sums: np.ndarray) -> list[float]:
    return [round(float(value), 2) for value in sums]


if __name__ == "__main__":
    sys.exit(main())
