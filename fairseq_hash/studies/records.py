"""The record of a run: all that a study's report needs, in one small JSON file, so that runs need not be kept.

A record is found again by its identity: the run's options, learning rate, seed and data. Another study, or the same one
on another machine, takes it instead of training again.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.fields import wrong_field
from fairseq_hash.core.files import atomic_write
from fairseq_hash.core.json_text import parse_object

TUNING, FINAL = "tuning", "final"


@dataclass(frozen=True)
class Scores:
    """The scores of a model on test: sums of nats, the negative log likelihood, and numbers of tokens.

    Attributes:
        nats: mean per token.
        position_nats: sum for each position in a sample, [L].
        position_tokens: [L].
        frequency_nats: sum for each range of `TextFacts.frequency_labels`, [B].
        document_nats: sum for each document of `TextFacts.document_tokens`, [D].
    """

    nats: float
    position_nats: list[float]
    position_tokens: list[int]
    frequency_nats: list[float]
    document_nats: list[float]


@dataclass(frozen=True)
class Validation:
    """One validation: after how many tokens and seconds of training, and the mean nats per token."""

    tokens: int
    seconds: float
    nats: float


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run before it starts.

    Attributes:
        identity: of options, learning rate, seed and data.
        model: its name in the study that trained it.
        experiment: the configuration and its overrides.
        learning_rate: of the run.
        seed: of the run.
        parameters: all.
        active: parameters that one token uses.
        experts: of a sparse layer, 0 for dense models.
        flops_per_token: forward and backward.
    """

    identity: str
    model: str
    experiment: list[str]
    learning_rate: float
    seed: int
    parameters: int
    active: int
    experts: int
    flops_per_token: float


@dataclass(frozen=True)
class RunRecord(RunFacts):
    """A finished training and its scores.

    Attributes:
        tokens: of the whole training.
        seconds: of the training, validations included.
        tokens_per_second: median over the log's intervals.
        validations: in order; the last one is at the end of the training.
        diverged: why the training is none (its loss became no number), "" if it is one.
        load_max: largest demand for an expert over the mean one in the last validation, worst layer; None if dense.
        dropped: share of the training's tokens that found their expert full, worst layer; None if dense.
        test: scores by what the evaluation changes (`StudyModel.evaluation`), {} for a run that only tunes.
        provenance: code, libraries, machine, date.
    """

    tokens: int
    seconds: float
    tokens_per_second: float
    validations: list[Validation]
    diverged: str = ""
    load_max: "float | None" = None
    dropped: "float | None" = None
    test: dict[str, Scores] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def valid_nats(self) -> float:
        """Mean nats per token of valid at the end of the training; infinity for one that diverged."""
        return math.inf if self.diverged else self.validations[-1].nats


@dataclass(frozen=True)
class TextFacts:
    """What the report needs of a study's text.

    Attributes:
        name, pieces: as in the study.
        fingerprint: of dictionary and binarized splits.
        tokens, bytes: by split; bytes of UTF-8 text.
        document_kind: what the parts of test are: documents, or passages of so many tokens.
        document_tokens: tokens of each, [D].
        frequency_labels: ranges of a token's count in training, such as "10-99", [B].
        frequency_tokens: tokens of test in each range, [B].
        tokens_per_sample: positions of a sample, L.
        ngrams: nats per token by subset and order ("1", "2", "3").
        ngram_frequency_nats: sums over test's ranges by order, [B].
    """

    name: str
    pieces: int
    fingerprint: str
    tokens: dict[str, int]
    bytes: dict[str, int]
    document_kind: str
    document_tokens: list[int]
    frequency_labels: list[str]
    frequency_tokens: list[int]
    tokens_per_sample: int
    ngrams: dict[str, dict[str, float]]
    ngram_frequency_nats: dict[str, list[float]]


def identity_of(options: Mapping[str, Any]) -> str:
    """Return 16 digits that tell JSON-ready options apart."""
    text = json.dumps(options, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_record(path: Path, record: "RunRecord | TextFacts") -> None:
    """Write a record as a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(asdict(record), allow_nan=False) + "\n", encoding="utf-8")


def read_record(path: Path) -> RunRecord:
    """Read a run's record. Raises `UserError` if it cannot be used."""
    content = _content(path, RunRecord)
    try:
        content["validations"] = [Validation(**one) for one in content["validations"]]
        content["test"] = {name: Scores(**one) for name, one in content["test"].items()}
    except (TypeError, AttributeError) as error:
        raise _no_record(path, error) from None
    record = _checked(path, RunRecord(**content))
    if not record.validations and not record.diverged:
        raise _no_record(path, "it has no validation")
    return record


def read_facts(path: Path) -> TextFacts:
    """Read the facts of a text. Raises `UserError` if they cannot be used."""
    facts = _checked(path, TextFacts(**_content(path, TextFacts)))
    counts = (facts.tokens, facts.bytes)
    if not all(count.keys() >= {"train", "valid", "test"} and min(count.values()) > 0 for count in counts):
        raise _no_record(path, "a split has no tokens or bytes")
    return facts


def _checked(path: Path, record: Any) -> Any:
    if (wrong := wrong_field(record)) is not None:
        raise _no_record(path, f"its {wrong} is not of its kind")
    return record


def _content(path: Path, kind: type) -> dict[str, Any]:
    try:
        content = parse_object(path.read_text(encoding="utf-8"))
        if set(content) != {f.name for f in fields(kind)}:
            raise ValueError("it has other entries than this version writes")
    except (OSError, ValueError) as error:
        raise _no_record(path, error) from None
    return content


def _no_record(path: Path, error: "Exception | str") -> UserError:
    return UserError(f"{path} is no record of a study ({error}); delete it, and the run is made again")


def read_records(folder: Path) -> dict[str, RunRecord]:
    """Return the records in a folder by their identity; of two of one identity, the one with more scores."""
    records: dict[str, RunRecord] = {}
    for path in sorted(folder.glob("*.json")):
        record = read_record(path)
        if record.identity not in records or len(record.test) > len(records[record.identity].test):
            records[record.identity] = record
    return records
