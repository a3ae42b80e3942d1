"""`python -m data_prep`, the real command: what it makes, how it goes on after a stop, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
from fairseq.data import Dictionary
from forked import run_python, start_python
from plugin import command
from prepared import SPLITS, arguments, lines_of, write_text

from data_prep import prepare as preparation
from data_prep.cli import main
from data_prep.corpora import CORPORA
from data_prep.prepare import Options, prepare
from data_prep.sources import GivenText, PublicText
from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing import dictionary_fingerprint
from fairseq_hash.provenance import sha256_of_file

ROOT = Path(__file__).resolve().parents[2]


def run(*words):
    """Run the command in a process of its own; return the finished process."""
    return run_python(["-m", "data_prep", *words], cwd=ROOT)


def test_text_to_data_and_back(tmp_path):
    """From the binarized data, by dictionary and model, comes every line of the text; the record is true."""
    files = write_text(tmp_path / "the text")
    out = tmp_path / "the data"
    command = [sys.executable, "-m", "data_prep", *arguments(files, out, "--vocab-size", "300")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)  # as people call it
    assert done.returncode == 0, done.stderr
    assert "ready" in done.stdout and not list(tmp_path.glob("*.partial*"))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(out / "sentencepiece.model"))
    assert processor.get_piece_size() == 300
    record = json.loads((out / "provenance.json").read_text())
    for split in SPLITS:
        text = files[split][0].read_text().split("\n")[:-1]
        rows = lines_of(out, split)
        assert [processor.decode(row) for row in rows] == text
        totals = record["splits"][split]
        assert totals["lines"] == len(text) and totals["tokens"] == sum(map(len, rows))
        assert totals["words"] == sum(len(line.split()) for line in text) and totals["unknown"] == 0
        assert record["sources"][split][0]["sha256"] == sha256_of_file(files[split][0])
    dictionary = Dictionary.load(str(out / "dict.txt"))
    assert dictionary.count[4] == max(dictionary.count[4:]) > 1
    assert record["dictionary_fingerprint"] == dictionary_fingerprint(dictionary.symbols)
    assert {name: sha256_of_file(out / name) for name in record["sha256"]} == record["sha256"]
    assert {"dict.txt", "train.bin", "test.idx", "sentencepiece.model"} <= set(record["sha256"])

    again = run(*arguments(files, out, "--vocab-size", "300"))
    assert again.returncode == 0 and "done before" in again.stdout
    other = run(*arguments(files, out, "--vocab-size", "310"))
    assert other.returncode == 1 and "holds something else; give another folder, or delete it" in other.stderr


def test_words_and_a_second_corpus_like_the_first(in_one_process, tmp_path, capsys):
    """Words as they stand; --like keeps the dictionary, and what it lacks is unknown and counted."""
    files = write_text(tmp_path / "text")
    out = tmp_path / "data"
    assert main(arguments(files, out, "--words")) == 0
    text = files["valid"][0].read_text().split("\n")[:-1]
    assert lines_of(out, "valid") == [line.split() for line in text]
    assert not (out / "sentencepiece.model").exists()
    (tmp_path / "other.txt").write_text("never seen\n\n" + text[0] + "\n")
    other = {split: [tmp_path / "other.txt"] for split in SPLITS}
    assert main(arguments(other, tmp_path / "like", "--words", "--like", str(out))) == 0
    assert (tmp_path / "like" / "dict.txt").read_bytes() == (out / "dict.txt").read_bytes()
    assert lines_of(tmp_path / "like", "test") == [["<unk>", "<unk>"], [], text[0].split()]
    record = json.loads((tmp_path / "like" / "provenance.json").read_text())
    assert record["splits"]["train"]["unknown"] == 2


@pytest.mark.parametrize("ways", [("--words",), ("--vocab-size", "300")], ids=["words", "pieces"])
def test_many_batches_and_workers_make_the_files_of_one_fairseq_preprocess(tmp_path, monkeypatch, ways):
    """Small batches in two processes, against fairseq-preprocess on the words, or on the model's pieces."""
    files = write_text(tmp_path / "text")
    monkeypatch.setattr(preparation, "BYTES_A_WORKER", 1000)
    monkeypatch.setattr(preparation.pieces, "BATCH_CHARACTERS", 500)
    out, whole = tmp_path / "data", tmp_path / "whole"
    assert main(arguments(files, out, *ways)) == 0
    prefixes = []
    for split in SPLITS:
        tokens = tmp_path / split
        tokens.write_bytes(files[split][0].read_bytes())
        if "--words" not in ways:
            processor = sentencepiece.SentencePieceProcessor(model_file=str(out / "sentencepiece.model"))
            rows = processor.encode(tokens.read_text().split("\n")[:-1], out_type=str)
            tokens.write_text("".join(" ".join(row) + "\n" for row in rows))
        prefixes += [f"--{split}pref", tokens]
    if "--words" not in ways:
        prefixes += ["--srcdict", out / "dict.txt"]
    command("preprocess", "--only-source", *prefixes, "--destdir", whole)
    for name in ("dict.txt", *(f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx"))):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("ways", [("--words",), ("--vocab-size", "300")], ids=["counting", "training"])
def test_a_killed_worker_is_one_line(tmp_path, monkeypatch, capsys, ways):
    """A worker that the system kills, at work on the tokens or on the model."""
    files = write_text(tmp_path / "text")
    submit = preparation.pieces.submit

    def submit_and_kill(pool, function, *arguments):
        future = submit(pool, function, *arguments)
        for process in list(pool._processes.values()):
            process.kill()
        return future

    monkeypatch.setattr(preparation.pieces, "submit", submit_and_kill)
    assert main(arguments(files, tmp_path / "data", *ways)) == 1
    killed = "a worker process was killed (is memory short?); give fewer --workers, then run again"
    assert capsys.readouterr().err == f"data_prep: {killed}\n" and not (tmp_path / "data").exists()


def test_a_killed_preparation_goes_on(in_one_process, tmp_path):
    """Killed after each step that is written down, the next call repeats none of them and makes the same data."""
    files = write_text(tmp_path / "text", lines=3000)
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    assert main(arguments(files, whole, "--vocab-size", "300")) == 0
    work = tmp_path / "stopped.partial"
    for step in ("model", "tokens"):
        words = ["-m", "data_prep", *arguments(files, out, "--vocab-size", "300")]
        child = start_python(words, tmp_path / "said", tmp_path / "said", ROOT)
        while step not in preparation.read_json(work / "state.json") and child.exitcode is None:
            time.sleep(0.01)
        os.killpg(child.pid, signal.SIGKILL)
        child.join()
        assert not out.exists() and step in preparation.read_json(work / "state.json")
    # Stopped while the data were written.
    (work / "train.bin").write_bytes(b"torn")
    model_made = (work / "sentencepiece.model").stat().st_mtime_ns
    assert main(arguments(files, out, "--vocab-size", "300")) == 0
    assert (out / "sentencepiece.model").stat().st_mtime_ns == model_made
    one, other = (json.loads((folder / "provenance.json").read_text()) for folder in (whole, out))
    assert one["sha256"] == other["sha256"]


def test_what_an_earlier_call_left_of_something_else_is_not_used(in_one_process, tmp_path):
    files = write_text(tmp_path / "text")
    work = tmp_path / "data.partial"
    (work / "text").mkdir(parents=True)
    (work / "state.json").write_text(json.dumps({"identity": {"corpus": "other"}, "model": "x", "tokens": "x"}))
    (work / "sentencepiece.model").write_text("of something else")
    assert main(arguments(files, tmp_path / "data", "--vocab-size", "300")) == 0
    assert "of something else" not in (tmp_path / "data" / "sentencepiece.model").read_bytes().decode("latin-1")


def test_two_calls_at_once_do_not_mix(tmp_path):
    files = write_text(tmp_path / "text")
    lock, refused = tmp_path / "data.partial.lock", "in use by another process"
    with preparation.exclusive(lock), pytest.raises(UserError, match=refused):
        prepare(GivenText(files), tmp_path / "data", Options(words=True))


def test_a_sample_is_taken_from_large_text(tmp_path, monkeypatch):
    """About the wanted size, from all over the text, the same for a seed."""
    files = write_text(tmp_path / "text", lines=5000)
    monkeypatch.setattr(preparation, "SAMPLE_BYTES", 20_000)
    samples = []
    for seed in (1, 1, 2):
        (tmp_path / "work").mkdir(exist_ok=True)
        options = Options(seed=seed)
        steps = preparation.Preparation(GivenText(files), tmp_path / "work", options, {"seed": len(samples)})
        steps.files, steps.bytes = files, {"train": files["train"][0].stat().st_size}
        with preparation.Display(1.0) as display:
            display.begin("sample", 1.0)
            taken = steps._write_sample(tmp_path / "sample.txt", display)
        samples.append((tmp_path / "sample.txt").read_text())
        assert taken == len(samples[-1].encode()) and 15_000 < taken <= 20_100
    assert samples[0] == samples[1] != samples[2]
    text = files["train"][0].read_text()
    assert text.index(samples[2].split("\n")[-2]) > len(text) * 0.6


BAD = [
    (("--vocab-size", "3"), "--vocab-size 3 is out of range"),
    (("--vocab-size", "100000"), "--vocab-size 100000 does not fit this text"),
    (("--workers", "0"), "--workers 0 is out of range"),
    (("--min-count", "2"), "--min-count 2 is for --words"),
    (("--words", "--min-count", "0"), "--min-count 0 is out of range"),
    (("--seed", "-1"), "--seed -1 is out of range"),
    (("--like", "nowhere"), "--like nowhere has no dict.txt"),
    (("--like", "nowhere", "--vocab-size", "300"), "leave out --vocab-size"),
    (("--train", "nowhere.txt"), "nowhere.txt is not a file"),
]


@pytest.mark.parametrize("more, message", BAD, ids=[message[:30] for _, message in BAD])
def test_bad_input_ends_in_one_line(in_one_process, tmp_path, capsys, more, message):
    files = write_text(tmp_path / "text")
    assert main(arguments(files, tmp_path / "data", *more)) == 1
    error = capsys.readouterr().err
    assert error.startswith("data_prep: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("content", [b"", b"\n\n", b"caf\xe9\n"])
def test_bad_text_ends_in_one_line(in_one_process, tmp_path, capsys, content):
    files = write_text(tmp_path / "text")
    files["valid"][0].write_bytes(content)
    assert main(arguments(files, tmp_path / "data", "--words")) == 1
    error = capsys.readouterr().err
    assert str(files["valid"][0]) in error and error.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_an_unknown_corpus_is_refused_in_one_line():
    done = run("wikitext-104", "--out", "x")
    assert done.returncode == 2 and "wikitext-2" in done.stderr and done.stderr.count("\n") == 1


def test_wikitext_by_words_is_checked_against_its_published_figures(in_one_process, tmp_path, capsys):
    """A local stand-in of the archive's files, with figures of its own: right ones pass, wrong ones are refused."""
    local = tmp_path / "wikitext"
    local.mkdir()
    text = " \n = Title = \n \n A <unk> text of words . \n"
    for split in SPLITS:
        (local / f"wiki.{split}.tokens").write_text(text)
    tokens = dict.fromkeys(SPLITS, 9 + 4)
    right = replace(CORPORA["wikitext-2"], expected_tokens=tokens)
    source = PublicText(right, tmp_path / "downloads", local, None, True)
    assert prepare(source, tmp_path / "data", Options(words=True))
    rows = lines_of(tmp_path / "data", "train")
    assert rows == [[], ["=", "Title", "="], [], ["A", "<unk>", "text", "of", "words", "."]]
    with pytest.raises(UserError, match="train has 13 tokens with the ends of lines, the published corpus 14"):
        source = PublicText(replace(right, expected_tokens={**tokens, "train": 14}), tmp_path / "d", local, None, True)
        prepare(source, tmp_path / "other", Options(words=True))
    # By pieces nothing is known beforehand.
    assert PublicText(right, tmp_path / "downloads", local, None, False).expected_tokens is None
    assert main(["wikitext-2", "--local", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x")]) == 1
    assert "nowhere does not exist" in capsys.readouterr().err
