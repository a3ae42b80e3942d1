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
from itertools import chain
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

import numpy as np
import sentencepiece

Result = TypeVar("Result")

BATCH_CHARACTERS = 1 << 20

# Words that fairseq's dictionary reserves. As text they would be read as padding or ends of lines.
RESERVED = ("<s>", "<pad>", "</s>")
UNKNOWN = "<unk>"
# SentencePiece silently leaves lines with this character out of its training.
LEFT_OUT = "\u2585"

# What `load` gave this process.
_processor: "sentencepiece.SentencePieceProcessor | None" = None
_indices: dict[str, int] = {}


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


def load(model: "str | None", indices: "dict[str, int] | None" = None) -> None:
    """Give this process the model that it cuts lines with (None: by words), and the ids of a dictionary's symbols."""
    global _processor, _indices
    _processor = sentencepiece.SentencePieceProcessor(model_file=model) if model else None
    _indices = indices or {}


def tokens_of(lines: list[str]) -> list[list[str]]:
    """Return each line as pieces, or as words if this process was given no model.

    Words are separated by white space, as in fairseq's own `tokenize_line`. `RESERVED` ones become `<unk>`.
    """
    if _processor is None:
        return [[UNKNOWN if word in RESERVED else word for word in line.split()] for line in lines]
    return _processor.encode(list(map(plain, lines)), out_type=str)


def count(lines: list[str]) -> tuple[dict[str, int], Counter[str]]:
    """Return what lines add up to, and how often each token occurs in them.

    The former are `lines`, `tokens` (without line ends), `words`, `characters`, and `reserved`: the number of tokens
    that are `<unk>` because fairseq's dictionary reserves their words.
    """
    words = [line.split() for line in lines]
    counts = Counter(chain.from_iterable(tokens_of(lines)))
    totals = {
        "lines": len(lines),
        "tokens": counts.total(),
        "words": sum(map(len, words)),
        "characters": sum(map(len, lines)),
        "reserved": 0 if _processor else sum(row.count(word) for row in words for word in RESERVED),
    }
    return totals, counts


def ids_of(lines: list[str]) -> tuple[np.ndarray, list[int]]:
    """Return the ids of all lines' tokens, each line with `</s>` after it, int64 `[tokens]`, and the lines' lengths."""
    unknown, end = _indices[UNKNOWN], _indices["</s>"]
    rows = [[*(_indices.get(token, unknown) for token in row), end] for row in tokens_of(lines)]
    return np.array(list(chain.from_iterable(rows)), dtype=np.int64), list(map(len, rows))


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
def workers(
    number: int, model: "Path | None", indices: "dict[str, int] | None" = None
) -> "Iterator[ProcessPoolExecutor]":
    """Start processes that have loaded a model and ids (`load`). An error ends them at once."""
    context = get_context("spawn")  # a forked copy of a process with threads can hang
    pool = ProcessPoolExecutor(number, context, _start_worker, (model and str(model), indices))
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
    """Give a pool some work.

    Ctrl-C on a terminal goes to every process; the pool's processes inherit this mask and ignore it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(function, *arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(model: "str | None", indices: "dict[str, int] | None") -> None:
    # A worker whose parent was killed would wait for work forever.
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    load(model, indices)


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def in_order(
    function: Callable[[list[str]], Result], lines: Iterable[str], pool: ProcessPoolExecutor
) -> Iterator[Result]:
    """Yield `function` of each batch of lines, in the order of the lines. Only a few batches are in memory."""
    waiting: deque[Future[Result]] = deque()
    for batch in batches(lines):
        waiting.append(submit(pool, function, batch))
        if len(waiting) > 2 * pool._max_workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
