"""From lines of text to lines of tokens (SentencePiece pieces or words), in worker processes, in order.

This file imports nothing from `fairseq_hash`, so that worker processes start in a fraction of a second and stay small.
"""

import io
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

import sentencepiece

Result = TypeVar("Result")

BATCH_CHARACTERS = 1 << 20

# Words that fairseq's dictionary reserves. As text they would be read as padding or ends of lines.
RESERVED = ("<s>", "<pad>", "</s>")
UNKNOWN = "<unk>"
# SentencePiece silently leaves lines with this character out of its training.
LEFT_OUT = "\u2585"

_processor: "sentencepiece.SentencePieceProcessor | None" = None


@dataclass(frozen=True)
class Batch:
    """Some lines of tokens, and their counts. `text` has a space between tokens and ends every line.

    `reserved`: number of tokens that are `<unk>` because fairseq's dictionary reserves their words.
    """

    text: str
    lines: int
    tokens: int
    words: int
    characters: int
    reserved: int
    counts: Counter[str]


def plain(line: str) -> str:
    """Return a line with one space for any white space, and none at its ends.

    White space is what `str.split` and fairseq take for it. SentencePiece knows fewer kinds: it would join the words on
    both sides of a vertical tab, and keep U+0085 inside pieces, which fairseq-preprocess then splits.
    """
    return " ".join(line.split())


def train_model(sample: Path, model: Path, vocabulary: int) -> None:
    """Train a byte-pair encoding (Sennrich et al. 2016) on the lines of a file and write it to `model`.

    `vocabulary` is the number of pieces, including the 256 bytes to which rare characters fall back. The text is
    normalised as SentencePiece does by default (NFKC; control characters are removed, runs of spaces become one space).

    Raises:
        RuntimeError: if `vocabulary` does not fit the text.
    """
    trained = io.BytesIO()
    with sample.open(encoding="utf-8", newline="\n") as lines:
        # With file names, the model would contain these names and differ between folders.
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line.rstrip("\n").replace(LEFT_OUT, " ") for line in lines),
            model_writer=trained,
            model_type="bpe",
            vocab_size=vocabulary,
            byte_fallback=True,
            character_coverage=0.9995,
            max_sentence_length=1 << 30,  # bytes; longer lines would be left out silently
            minloglevel=2,
        )
    model.write_bytes(trained.getvalue())


def model_pieces(model: Path) -> list[str]:
    """Return the pieces that a model can produce, without its control symbols."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = range(processor.get_piece_size())
    return [processor.id_to_piece(i) for i in ids if not (processor.is_control(i) or processor.is_unknown(i))]


def encode(lines: list[str]) -> Batch:
    """Return lines as pieces, or as words if this process was given no model.

    Words are separated by white space, as in fairseq's own `tokenize_line`. `RESERVED` ones become `<unk>`.
    """
    words = [line.split() for line in lines]
    rows = words if _processor is None else _processor.encode([" ".join(row) for row in words], out_type=str)
    counts = Counter[str]()
    for row in rows:
        counts.update(row)
    if reserved := sum(counts.pop(word, 0) for word in RESERVED):
        rows = [[UNKNOWN if word in RESERVED else word for word in row] for row in rows]
        counts[UNKNOWN] += reserved
    text = "".join(" ".join(row) + "\n" for row in rows)
    tokens, characters = sum(map(len, rows)), sum(map(len, lines))
    return Batch(text, len(lines), tokens, sum(map(len, words)), characters, reserved, counts)


def batches(lines: Iterable[str]) -> Iterator[list[str]]:
    """Group lines into batches of about a million characters."""
    batch: list[str] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line) + 1
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def workers(count: int, model: "Path | None") -> "Iterator[ProcessPoolExecutor]":
    """Start `count` processes that encode with a model, or by words if it is None. An error ends them at once."""
    context = get_context("spawn")  # a forked copy of a process with threads can hang
    pool = ProcessPoolExecutor(count, context, _start_worker, (model and str(model),))
    others = set(multiprocessing.active_children())
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # otherwise SentencePiece's training would continue for minutes
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def submit(pool: ProcessPoolExecutor, function: Callable[..., Result], *arguments: object) -> "Future[Result]":
    """Give a pool some work. Ctrl-C on a terminal goes to every process; the pool's processes inherit this mask and
    ignore it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(function, *arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(model: "str | None") -> None:
    # A worker whose parent was killed would wait for work forever.
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    _load_model(model)


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _load_model(model: "str | None") -> None:
    global _processor
    _processor = sentencepiece.SentencePieceProcessor(model_file=model) if model else None


def encode_in_order(lines: Iterable[str], pool: ProcessPoolExecutor, count: int) -> Iterator[Batch]:
    """Encode lines in a pool of `count` processes. Batches come in the order of the lines, and only a few are in memory
    at a time.
    """
    waiting: deque[Future[Batch]] = deque()
    for batch in batches(lines):
        waiting.append(submit(pool, encode, batch))
        if len(waiting) > 2 * count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
