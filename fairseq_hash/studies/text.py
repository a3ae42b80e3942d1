"""The text of a study: prepared once for all studies that share it, with its facts and its n-gram lines."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.progress import Display
from fairseq_hash.experiments.ngrams import KneserNey, orders_that_fit
from fairseq_hash.hashing.dictionary import read_dictionary
from fairseq_hash.provenance import sha256_of_file
from fairseq_hash.studies.commands import run_command
from fairseq_hash.studies.definition import EMBEDDED, StudyText
from fairseq_hash.studies.measures import (
    by_document,
    by_frequency,
    bytes_of_stream,
    documents,
    frequency_edges,
)
from fairseq_hash.studies.records import TextFacts, identity_of
from fairseq_hash.table_tools.token_streams import open_text

SPLITS = ("train", "valid", "test")
ENDINGS = ("", ".xz", ".gz", ".bz2")
WORK = 10.0  # units of a display


def prepare_text(text: StudyText, source: "Path | None", work: Path, display: Display) -> Path:
    """Return the folder of a study's binarized data, made below `work` unless it is there.

    `source` has train.txt, valid.txt and test.txt, plain or compressed; None for the embedded text.

    Raises:
        UserError: if there is no such text, or it is too short.
    """
    words, content = _source(text, source)
    made_of = {"text": content, "pieces": text.pieces, "made_as": text.made_as}
    whole = work / f"{text.name}-{text.pieces}-{identity_of(made_of)[:8]}"
    part = work / f"{whole.name}-{identity_of(asdict(text) | made_of)[:8]}"
    work.mkdir(parents=True, exist_ok=True)
    if not (part / "dict.txt").is_file():
        _data([*words, "--vocab-size", str(text.pieces), "--out", str(whole)], "text in pieces", display)
        sizes = [word for split in SPLITS for word in (f"--{split}-tokens", str(getattr(text, f"{split}_tokens")))]
        _data(["cut", str(whole), *sizes, "--out", str(part)], "the study's part of it", display)
    return part


def given_text(text: StudyText, data: Path) -> Path:
    """Return a folder of binarized data that a study has made elsewhere, such as on a machine that has the text.

    Raises:
        UserError: if files are missing, or it has more tokens than the study takes, so that it is not the study's.
    """
    names = ["dict.txt", *(f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx"))]
    if missing := [name for name in names if not (data / name).is_file()]:
        raise UserError(f"--data {data} has no {missing[0]}; give a folder that a study made in the data of its --work")
    symbols, _ = read_dictionary(data / "dict.txt")
    for split in SPLITS:
        tokens = sum(map(len, open_text(data, split, symbols).blocks()))
        if tokens > (most := getattr(text, f"{split}_tokens")):
            raise UserError(
                f"--data {data} has {tokens:,} tokens of {split} and the study takes {most:,}; give the folder that "
                "this study made in the data of its --work"
            )
    return data


def _source(text: StudyText, source: "Path | None") -> tuple[list[str], list[str]]:
    """Return the arguments of `fairseq-hash data` for a text, and what tells it from others."""
    if text.name == EMBEDDED:
        if source is not None:
            raise UserError(f"--text {source}: the study takes the text that comes with Python; leave --text out")
        return [EMBEDDED], [sys.version.split()[0]]
    if source is None:
        raise UserError(
            f"the study's text is {text.name}; give the folder of its train.txt, valid.txt and test.txt as --text DIR"
        )
    paths = {}
    for split in SPLITS:
        known = [source / f"{split}.txt{ending}" for ending in ENDINGS]
        if not (found := [path for path in known if path.is_file()]):
            raise UserError(f"--text {source} has no {split}.txt; give a folder of train.txt, valid.txt and test.txt")
        paths[split] = found[0]
    words = [text.made_as, *(word for split, path in paths.items() for word in (f"--{split}", str(path)))]
    return words, [sha256_of_file(path) for path in paths.values()]


def _data(words: Sequence[str], name: str, display: Display) -> None:
    """Run `fairseq-hash data`, whose own line says what went wrong."""
    display.begin(name, WORK)
    run_command(["data", *words], "the text cannot be prepared")
    display.end("ready")


def fingerprint_of(data: Path) -> str:
    """Return 16 digits that tell binarized data apart: of dictionary and splits."""
    names = ["dict.txt", *(f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx"))]
    return identity_of({name: sha256_of_file(data / name) for name in names})


def facts_of(text: StudyText, data: Path, tokens_per_sample: int, display: Display) -> TextFacts:
    """Count what the report needs of a study's data, its n-gram lines included."""
    symbols, _ = read_dictionary(data / "dict.txt")
    streams = {split: np.concatenate(list(open_text(data, split, symbols).blocks())) for split in SPLITS}
    counts = np.bincount(streams["train"], minlength=len(symbols))  # dict.txt does not count ends of lines
    document_S, kind = documents(streams["test"])
    edges, labels = frequency_edges(counts)
    nothing_S = np.zeros(len(streams["test"]))
    ngrams: dict[str, dict[str, float]] = {"valid": {}, "test": {}}
    of_ranges: dict[str, list[float]] = {}
    for order in orders_that_fit(len(symbols)):
        display.begin(f"n-grams of {order}", 1)
        model = KneserNey(streams["train"], order, len(symbols))
        for split, lines in ngrams.items():
            nats_S = model.token_nats(streams[split])
            lines[str(order)] = float(nats_S.mean())
        of_ranges[str(order)] = by_frequency(nats_S, streams["test"], counts, edges)[0].tolist()  # of test
        display.end(f"perplexity {np.exp(ngrams['test'][str(order)]):.2f} on test")
    return TextFacts(
        name=text.name,
        pieces=text.pieces,
        fingerprint=fingerprint_of(data),
        tokens={split: len(stream_S) for split, stream_S in streams.items()},
        bytes={split: bytes_of_stream(stream_S, symbols)[0] for split, stream_S in streams.items()},
        document_kind=kind,
        document_tokens=by_document(nothing_S, document_S)[1].tolist(),
        frequency_labels=labels,
        frequency_tokens=by_frequency(nothing_S, streams["test"], counts, edges)[1].tolist(),
        tokens_per_sample=tokens_per_sample,
        ngrams=ngrams,
        ngram_frequency_nats=of_ranges,
    )
