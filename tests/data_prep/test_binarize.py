"""Binarized data: the files of one fairseq-preprocess, dictionaries fairseq's own, tokens survive fairseq."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from fairseq.data import Dictionary, indexed_dataset
from fairseq.tokenizer import tokenize_line
from hypothesis import given
from hypothesis import strategies as st
from plugin import command

from data_prep import pieces
from data_prep.binarize import binarize, make_dictionary

ROOT = Path(__file__).resolve().parents[2]


def write_tokens(path, lines, seed, words=50):
    """Lines of 0 to 9 words with Zipf frequencies; the last words occur once or never."""
    generator = random.Random(seed)
    names = [f"w{n}" for n in range(words)]
    weights = [1 / (n + 1) for n in range(words)]
    text = [" ".join(generator.choices(names, weights, k=generator.randint(0, 9))) for _ in range(lines)]
    path.write_text("\n".join(text) + "\n")
    return text


@pytest.mark.parametrize("vocabulary", [50, 70_000], ids=["uint16", "uint32"])
def test_batches_become_the_files_of_one_fairseq_preprocess(tmp_path, monkeypatch, vocabulary):
    """Batches of some lines, blank ones among them, against fairseq-preprocess on the text: byte for byte."""
    lines = [*write_tokens(tmp_path / "text", 40, 1), "", *write_tokens(tmp_path / "text", 25, 2)]
    (tmp_path / "text").write_text("".join(line + "\n" for line in lines))
    counts = Counter(word for line in lines for word in line.split())
    counts.update({f"rare{n}": 0 for n in range(vocabulary - 50)})
    dictionary = make_dictionary(counts, list(counts), None, 1)
    dictionary.save(str(tmp_path / "dict.txt"))
    whole = tmp_path / "whole"
    command("preprocess", "--only-source", "--trainpref", tmp_path / "text", "--destdir", whole, "--srcdict",
            tmp_path / "dict.txt")  # fmt: skip
    monkeypatch.setattr(pieces, "BATCH_CHARACTERS", 40)
    pieces.load(None, dictionary.indices)
    binarize(map(pieces.ids_of, pieces.batches(lines)), len(dictionary), tmp_path / "train")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"train{suffix}").read_bytes() == (whole / f"train{suffix}").read_bytes()
    data = indexed_dataset.make_dataset(str(tmp_path / "train"), "mmap")
    assert len(data) == 66 and data.sizes.sum() == sum(counts.values()) + 66


@pytest.mark.parametrize("least, most", [(1, None), (3, None), (1, 20)])
def test_the_dictionary_of_words_is_fairseqs_own(tmp_path, least, most):
    """Against the dict.txt that fairseq-preprocess makes of the same text, with its own options."""
    text = write_tokens(tmp_path / "train.txt", 60, 3)
    counts = Counter(word for line in text for word in line.split())
    make_dictionary(counts, None, most, least).save(str(tmp_path / "dict.txt"))
    options = ("--thresholdsrc", str(least), *(("--nwordssrc", str(most)) if most else ()))
    prefix = ("--trainpref", tmp_path / "train.txt", "--destdir", tmp_path / "bin")
    command("preprocess", "--only-source", *prefix, "--dict-only", *options)
    assert (tmp_path / "dict.txt").read_bytes() == (tmp_path / "bin" / "dict.txt").read_bytes()


def test_a_models_pieces_are_all_symbols():
    """Pieces that do not occur in the training text have a place, too: they can occur in other text."""
    dictionary = make_dictionary(Counter({"b": 5, "c": 9, "stray": 3}), ["a", "b", "c"], None, 1)
    assert dictionary.symbols[4:7] == ["c", "b", "a"] and dictionary.count[4:7] == [9, 5, 0]
    assert "stray" not in dictionary.indices and len(dictionary) % 8 == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tokens(folder / "sample.txt", 400, 4)
    pieces.train_model(folder / "sample.txt", folder / "sentencepiece.model", 300)
    pieces.load(str(folder / "sentencepiece.model"))
    yield folder / "sentencepiece.model"
    pieces.load(None)


@given(st.lists(st.text(max_size=30).filter(lambda line: "\n" not in line), min_size=1, max_size=5))
def test_pieces_survive_fairseq_and_give_the_text_back(model, lines):
    """fairseq splits a line at white space of any kind: every piece must come out whole, and all of them be known.

    Joined again the pieces are the text as SentencePiece normalises it, whatever its characters: nothing is unknown.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    dictionary = make_dictionary(Counter(), pieces.model_pieces(model), None, 1)
    totals, counts = pieces.count(lines)
    rows = pieces.tokens_of(lines)
    assert len(rows) == totals["lines"] == len(lines) and totals["tokens"] == sum(counts.values())
    for line, row in zip(map(pieces.plain, lines), rows, strict=True):
        assert tokenize_line(" ".join(row)) == row == processor.encode(line, out_type=str)
        assert dictionary.unk() not in dictionary.encode_line(" ".join(row), add_if_not_exist=False).tolist()
        assert processor.decode(row) == processor.decode(processor.encode(line))


@given(st.lists(st.text(max_size=30).filter(lambda line: "\n" not in line), min_size=1, max_size=5))
def test_words_are_those_that_fairseq_sees(lines):
    pieces.load(None)
    assert pieces.tokens_of(lines) == [tokenize_line(line) for line in lines]
    totals, counts = pieces.count(lines)
    expected = Counter(word for line in lines for word in tokenize_line(line))
    assert counts == expected and totals["words"] == totals["tokens"] == sum(expected.values())
    assert totals["characters"] == sum(map(len, lines))


def test_a_pool_keeps_the_order(model, monkeypatch):
    """Two processes and batches of a few lines give what one process gives at once."""
    lines = [f"w{n % 50} w{n % 7}" for n in range(300)]
    expected = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(lines, out_type=str)
    monkeypatch.setattr(pieces, "BATCH_CHARACTERS", 40)
    with pieces.workers(2, model) as pool:
        found = list(pieces.in_order(pieces.tokens_of, lines, pool))
    assert len(found) > 40 and [row for batch in found for row in batch] == expected


def test_workers_leave_ctrl_c_to_their_parent():
    """A terminal sends it to every process of a command; theirs would each print a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    with pieces.workers(1, None) as pool:
        mask = pieces.submit(pool, signal.pthread_sigmask, signal.SIG_BLOCK, set()).result()
    assert signal.SIGINT in mask
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == before and signal.SIGINT not in before


def test_an_error_ends_workers_at_once():
    """Not only when they have done their work, which can take SentencePiece minutes."""
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), pieces.workers(1, None) as pool:
        pieces.submit(pool, time.sleep, 0).result()
        pieces.submit(pool, time.sleep, 300)
        raise KeyboardInterrupt
    assert time.monotonic() - began < 150


def test_workers_end_with_their_parent(tmp_path):
    """A process that is killed leaves none of its workers behind."""
    program = (
        "import os, sys, time\n"
        "from data_prep import pieces\n"
        "if __name__ == '__main__':\n"
        "    with pieces.workers(2, None) as pool:\n"
        "        list(pieces.in_order(pieces.tokens_of, ['a'] * 10, pool))\n"
        "        print(*(process.pid for process in pool._processes.values()), flush=True)\n"
        "        time.sleep(60)\n"
    )
    (tmp_path / "parent.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, env=environment)
    children = [int(number) for number in parent.stdout.readline().split()]
    assert children
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(600):
        alive = [pid for pid in children if is_running(pid)]
        if not alive:
            break
        time.sleep(0.05)
    assert not alive


def is_running(pid):
    """Whether a process runs; one that has ended and waits to be noticed by its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    except FileNotFoundError:
        return False


def test_batches_hold_every_line_once():
    lines = [str(n) for n in range(1000)]
    assert [line for batch in pieces.batches(lines) for line in batch] == lines
    assert list(pieces.batches([])) == []


def test_special_words_of_fairseq_keep_their_place():
    """WikiText's <unk> is fairseq's <unk>, and its count does not make a symbol."""
    dictionary = make_dictionary(Counter({"<unk>": 7, "a": 2}), None, None, 1)
    assert dictionary.symbols[:5] == ["<s>", "<pad>", "</s>", "<unk>", "a"]
    ids = dictionary.encode_line("a <unk> b", add_if_not_exist=False)
    assert ids.tolist() == [4, 3, 3, Dictionary().eos()] and np.array_equal(dictionary.count[4:5], [2])
