"""`python -m data_prep cut`: smaller copies of prepared data, beside a naive cut and fairseq's own reading."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from called import call
from fairseq.data import Dictionary, indexed_dataset
from prepared import SPLITS, arguments, write_text

from data_prep import cut as cutting
from data_prep.cli import main
from data_prep.cut import passages_of
from fairseq_hash.cli import data as of_the_command
from fairseq_hash.provenance import sha256_of_file


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder that data_prep wrote, of pieces, with blank lines in all splits."""
    from one_process import one_process

    folder = tmp_path_factory.mktemp("prepared")
    files = write_text(folder / "text")
    for split in SPLITS:
        lines = files[split][0].read_text().splitlines()
        lines[::7] = [""] * len(lines[::7])
        files[split][0].write_text("\n".join(lines) + "\n")
    with one_process():
        assert main(arguments(files, folder / "data", "--vocab-size", "300")) == 0
    return folder / "data"


def read(folder, split):
    data = indexed_dataset.make_dataset(str(folder / split), "mmap")
    return [data[number].tolist() for number in range(len(data))]


def naive(sizes, tokens, passages):
    """The lines that are taken, each with the number of its tokens, line by line."""
    starts = [sum(sizes[:line]) for line in range(len(sizes))]
    total, line, taken = sum(sizes), 0, []
    for number in range(passages):
        got = sum(size for _, size in taken)
        goal = tokens * (number + 1) // passages
        if got >= goal:
            continue
        begin, beyond = total * number // passages, total * (number + 1) // passages
        possible = [n for n in range(line, len(sizes)) if total - starts[n] >= tokens - got]
        stretch = [n for n in possible if begin <= starts[n]]
        documents = [n for n in stretch if starts[n] < beyond and sizes[n] > 1 and (n == 0 or sizes[n - 1] == 1)]
        line = (documents or stretch or possible[-1:])[0]
        while got < goal:
            taken.append((line, min(sizes[line], tokens - got)))
            got, line = got + taken[-1][1], line + 1
    return taken


def test_passages_are_those_of_a_naive_loop():
    """Of random lines, few and many tokens, with and without documents: exact, in order, none twice."""
    random = np.random.default_rng(0)
    for trial in range(300):
        size_N = random.integers(1, (2, 5, 40)[trial % 3], int(random.integers(1, 120))) + (trial % 2)
        size_N = np.append(size_N, 3).astype(np.int32)
        total = int(size_N.sum())
        tokens = (total, max(1, total - 1), max(1, total // 3), int(random.integers(1, total + 1)))[trial % 4]
        count = int(random.integers(1, 20))
        found = passages_of(size_N, tokens, count)
        taken = []
        for passage in found:
            left = passage.tokens
            for line in range(passage.first, passage.end):
                taken.append((line, min(left, int(size_N[line]))))
                left -= taken[-1][1]
            assert left == 0
        assert taken == naive(size_N.tolist(), tokens, count), (trial, tokens, count)
        assert sum(size for _, size in taken) == tokens and len(found) <= count
        assert [line for line, _ in taken] == sorted({line for line, _ in taken})
        assert all(size == size_N[line] for line, size in taken[:-1])


def test_passages_lie_evenly():
    """One in each stretch, at the beginning of a document."""
    size_N = np.tile([9, 8, 7, 1], 1000)  # documents of 25 tokens
    found = passages_of(size_N, 2000, 10)
    assert [passage.first for passage in found] == [400 * number for number in range(10)]
    assert [passage.tokens for passage in found] == [200] * 10  # eight documents each


def test_a_cut_is_what_fairseq_reads(prepared, tmp_path, monkeypatch, capsys):
    """Exact numbers of tokens, lines of the source, symbols in place, counts of the new train split, the record."""
    monkeypatch.setattr(cutting, "LEAST", 50)
    monkeypatch.setattr(cutting, "BATCH", 3)
    out = tmp_path / "new" / "small"
    words = ["cut", str(prepared), "--out", str(out), "--train-tokens", "1501", "--valid-tokens", "99"]
    assert main(words) == 0 and "ready; train with" in capsys.readouterr().out
    record = json.loads((out / "provenance.json").read_text())
    whole, small = (Dictionary.load(str(folder / "dict.txt")) for folder in (prepared, out))
    assert small.symbols == whole.symbols and any(symbol.startswith("madeupword") for symbol in small.symbols)
    counts = Counter(token for line in read(out, "train") for token in line)
    assert small.count[4:] == [counts[number] for number in range(4, len(small))] and small.count[:4] == [1] * 4
    for split, tokens, passages in (("train", 1501, 30), ("valid", 99, 1)):
        lines, source = read(out, split), read(prepared, split)
        assert sum(map(len, lines)) == tokens
        assert record["cut"][split] == {
            "tokens": tokens,
            "of_tokens": sum(map(len, source)),
            "passages": passages,
        }
        expected = naive([len(line) for line in source], tokens, passages)
        assert lines == [source[line][:size] for line, size in expected]
    assert read(out, "test") == read(prepared, "test")
    assert (out / "sentencepiece.model").read_bytes() == (prepared / "sentencepiece.model").read_bytes()
    assert record["identity"]["of"] == {n: sha256_of_file(prepared / n) for n in record["identity"]["of"]}
    names = {path.name for path in out.iterdir()} - {"provenance.json"}
    assert names == {"dict.txt", "sentencepiece.model", *(f"{s}.{k}" for s in SPLITS for k in ("bin", "idx"))}
    assert record["sha256"] == {name: sha256_of_file(out / name) for name in names}
    assert record["numpy"] == np.__version__ and record["symbols"] == len(small)
    # The same again is done, another is refused; a cut can be cut.
    made = (out / "provenance.json").stat().st_mtime_ns
    assert main(words) == 0 and "done before" in capsys.readouterr().out
    assert main([*words[:-1], "98"]) == 1 and "holds something else" in capsys.readouterr().err
    assert (out / "provenance.json").stat().st_mtime_ns == made
    assert main(["cut", str(out), "--out", str(tmp_path / "smaller"), "--train-tokens", "77"]) == 0
    assert sum(map(len, read(tmp_path / "smaller", "train"))) == 77
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "smaller"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["small"]


def test_data_made_like_others_keep_their_dictionary(prepared, tmp_path):
    """A balanced table is made of its counts: others would be another model. A cut of the cut keeps it, too."""
    from one_process import one_process

    files = write_text(tmp_path / "text")
    with one_process():
        assert main(arguments(files, tmp_path / "like", "--like", str(prepared))) == 0
    of = tmp_path / "like"
    for name in ("small", "smaller"):
        out = tmp_path / name
        tokens = {"small": "900", "smaller": "90"}[name]
        assert main(["cut", str(of), "--out", str(out), "--train-tokens", tokens]) == 0
        assert sum(map(len, read(out, "train"))) == int(tokens)
        assert (out / "dict.txt").read_bytes() == (prepared / "dict.txt").read_bytes()
        record = json.loads((out / "provenance.json").read_text())
        assert record["identity"]["like"] and record["symbols"] == len(Dictionary.load(str(out / "dict.txt")))
        of = out


def test_data_of_fairseq_preprocess(data, tmp_path, monkeypatch):
    """Words, without a SentencePiece model; by the other command, which an installed copy of `data_prep` serves."""
    monkeypatch.setattr(of_the_command, "find_spec", lambda name: None)
    status, out, err = call("data", "cut", data, "--out", tmp_path / "small", "--train-tokens", 640)
    assert status == 0 and "ready" in out, err
    assert sum(map(len, read(tmp_path / "small", "train"))) == 640
    for name in ("valid.bin", "valid.idx", "test.bin", "test.idx"):
        assert (tmp_path / "small" / name).read_bytes() == (data / name).read_bytes()


@pytest.fixture
def refused(capsys):
    """Return a function of a command's words: the one line that it ends with."""

    def call(*words):
        assert main(["cut", *map(str, words)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("data_prep: ") and err.endswith("\n") and err.count("\n") == 1
        return err

    return call


def test_bad_input_gets_one_line_and_no_folder(data, tmp_path, monkeypatch, refused):
    out = ("--out", tmp_path / "out")
    tokens = sum(map(len, read(data, "valid")))
    range_line = f"{data}/valid has {tokens:,} tokens: give a number from 1 to that, or leave the option out"
    for number in (tokens + 1, 0, -5):
        line = refused(data, *out, "--valid-tokens", number)
        assert f"--valid-tokens {number:,} is out of range; {range_line}" in line
    assert "is no folder; give one that data_prep" in refused(tmp_path / "none", *out)
    assert "dict.txt does not exist" in refused(tmp_path, *out)
    copy = shutil.copytree(data, tmp_path / "copy")
    (copy / "test.idx").unlink()
    assert "has no test.idx" in refused(copy, *out)
    shutil.copy(data / "valid.idx", copy / "test.idx")
    assert "is damaged" in refused(copy, *out)
    with (copy / "dict.txt").open("a") as file:
        file.write("word1 3 #fairseq:overwrite\n")
    assert "has a symbol twice" in refused(copy, *out)
    assert "holds something else" in refused(data, "--out", copy)
    monkeypatch.setattr(cutting, "shutil", None)  # what stops it leaves nothing behind
    with pytest.raises(AttributeError):
        main(["cut", str(data), *map(str, out), "--train-tokens", "99"])
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_tokens_that_are_no_symbols(data, tmp_path, refused):
    """Of another dictionary."""
    copy = shutil.copytree(data, tmp_path / "copy")
    builder = indexed_dataset.MMapIndexedDatasetBuilder(str(copy / "train.bin"), dtype=np.uint16)
    builder.add_item(torch.tensor([4, 900, 2]))
    builder.finalize(str(copy / "train.idx"))
    line = refused(copy, "--out", tmp_path / "out", "--train-tokens", 3)
    assert "train.bin has a token that is not a symbol" in line and not (tmp_path / "out").exists()
