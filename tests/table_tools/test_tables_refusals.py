"""What `fairseq-hash tables` refuses: one line that names the value and the remedy, and no file is left."""

import struct

import pytest
import torch
from called import WORDS, call, refused
from made_tables import done, embeddings

from fairseq_hash.hashing.dictionary import read_dictionary

OPTIONS = [
    (["--num-experts", 0], "--num-experts 0 is out of range; give a number of 1 or more"),
    (["--num-experts", -3], "--num-experts -3 is out of range"),
    (["--seed", -1], "--seed -1 is out of range; give a number of 0 or more"),
    (["--restarts", 0], "--restarts 0 is out of range"),
    (["--multi-hash", 0], "--multi-hash 0 is out of range"),
    (["--tokens-per-sample", -1], "--tokens-per-sample -1 is out of range"),
    (["--experts-per-token", 3], "--experts-per-token 3 exceeds --num-experts 2"),
    (["--experts-per-token", 2, "--multi-hash", 2], "--multi-hash and --experts-per-token exclude each other"),
    (["--base", "scattered"], "--base goes with --builder spread; leave it out for balanced"),
    (["--multi-hash", 2, "--builder", "modulo"], "--multi-hash 2 needs a builder that can make different tables"),
    (["--restarts", 3, "--builder", "round-robin"], "--restarts 3: the builder round-robin makes one table only"),
    (["--counts", "a", "--text", "b"], "--counts and --text both give the counts of tokens"),
    (["--feature", "word"], "--feature word needs --words"),
    (["--words", "a"], "--words goes with --feature word"),
    (["--keys", 5], "--keys goes with features of buckets and positions"),
    (["--feature", "ngram"], "--length 0 does not go with --feature ngram"),
    (["--length", 2], "--length 2 goes with --feature ngram or history"),
    (["--feature", "position", "--builder", "random"], "--feature position needs --keys"),
    (["--feature", "position", "--keys", 9, "--text", "a"], "--feature position needs --tokens-per-sample"),
    (["--feature", "predicted", "--text", "a"], "--feature predicted cannot be counted in a text"),
    (["--feature", "bigram"], "--builder balanced needs --text for --feature bigram"),
    (["--feature", "bigram", "--builder", "random", "--counts", "a"], "--counts goes with features of tokens"),
    (["--feature", "bigram", "--builder", "clusters"], "--builder clusters is for features of tokens"),
    (["--feature", "bigram", "--builder", "random", "--restarts", 2], "nothing says which table is best"),
    (["--feature", "previous", "--builder", "spread"], "--builder spread is for --feature token, not previous"),
    (["--builder", "spread"], "--builder spread needs --text"),
    (["--builder", "dispersed"], "--builder dispersed needs --embeddings"),
    (["--embeddings", "a"], "--embeddings goes with the builders clusters and dispersed"),
    (["--clusters", 2], "--clusters goes with --builder dispersed"),
    (["--builder", "clusters", "--embeddings", "a", "--seed", 2**32], "is out of range for k-means"),
    (["--builder", "clusters", "--embeddings", "none"], "none does not exist"),
    (["--text", "none"], "none does not exist; give a file of symbols, a binarized text without .bin and .idx"),
    (["--counts", "none"], "none does not exist; give a file of lines `symbol count`"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options_that_do_not_go_together(dictionary, tmp_path, options, message):
    """Before anything is read where that can be."""
    options = options if "--num-experts" in options else ["--num-experts", 2, *options]
    assert message in refused("tables", "build", dictionary, *options, "--out", tmp_path / "t")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dict.txt"]


def test_where_to_write(dictionary, tmp_path):
    build = ("tables", "build", dictionary, "--num-experts", 2, "--out")
    nowhere = tmp_path / "none" / "t"
    assert f"the folder {nowhere.parent} does not exist; make it first" in refused(*build, nowhere)
    (tmp_path / "folder").mkdir()
    assert f"--out {tmp_path / 'folder'} is a folder; give a file" in refused(*build, tmp_path / "folder")
    done(*build[1:], tmp_path / "t")
    assert "exists; give another file, or add --overwrite to replace it" in refused(*build, tmp_path / "t")
    done(*build[1:], tmp_path / "t", "--overwrite")
    assert "is a file; give a folder" in refused("tables", "show", tmp_path / "t", dictionary, "--out", dictionary)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dict.txt", "folder", "t"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, " does not exist; give the dict.txt that fairseq-preprocess wrote"),
        (b"the 5\nthe 4\n", " is no fairseq dictionary: line 2 repeats the symbol 'the'"),
        (b"of 1\nthe\n", " is no fairseq dictionary: line 2 is not a symbol and its count"),
        (b"the many\n", " is no fairseq dictionary: line 1 is not a symbol and its count"),
        (b"caf\xe9 5\n", " is no fairseq dictionary: it is not text in UTF-8"),
        (b"", "has no token counts (none is above 1)"),
        (b"the 1\nof 1\n", "has no token counts (none is above 1)"),
    ],
)
def test_a_dictionary_that_is_none(tmp_path, content, message):
    path = tmp_path / "dict.txt"
    if content is not None:
        path.write_bytes(content)
    assert message in refused("tables", "build", path, "--num-experts", 2, "--out", tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"the 5\nof\n", "is no file of counts: line 2 is not a symbol and its count of 0 or more"),
        (b"the -5\n", "is no file of counts: line 1 is not"),
        (b"the 5\nof 2\nthe 6\n", "is no file of counts: line 3 repeats the symbol 'the'"),
        (b"the 0\nother 7\n", "counts no symbol of the dictionary above 0"),
        (b"", "counts no symbol of the dictionary above 0"),
        (b"the 1\n", "has no token counts (none is above 1)"),
        (b"\xff\xfe", "it is not text in UTF-8"),
    ],
)
def test_counts_that_are_none(dictionary, tmp_path, content, message):
    counts = tmp_path / "counts"
    counts.write_bytes(content)
    build = ("tables", "build", dictionary, "--num-experts", 2, "--counts", counts, "--out", tmp_path / "t")
    assert message in refused(*build)
    assert not (tmp_path / "t").exists()


def test_texts_that_are_none(data, tmp_path):
    """Empty, not UTF-8, cut short, of another dictionary, ids beyond the dictionary, no such subset."""
    listed = data / "dict.txt"

    def message(text, *more, by=listed):
        build = ("tables", "build", by, "--num-experts", 2, "--out", tmp_path / "t")
        return refused(*build, "--text", text, *more)

    text = tmp_path / "text"
    text.write_text("")
    assert f"{text} has no tokens; give a text to count" in message(text)
    text.write_bytes(b"word1 caf\xe9\n")
    assert "is not text in UTF-8" in message(text)
    assert "has no other.idx; give a folder that fairseq-preprocess wrote" in message(data, "--subset", "other")

    index, tokens = ((data / f"valid{suffix}").read_bytes() for suffix in (".idx", ".bin"))
    part = tmp_path / "part"
    for new_index, new_tokens, expected in (
        (index[:20], tokens, "part.idx is not an index that fairseq-preprocess wrote"),
        (b"X" + index[1:], tokens, "part.idx is not an index that fairseq-preprocess wrote"),
        (index[:80], tokens, "part.bin is damaged: its size differs from that in part.idx"),
        (index, tokens[:-2], "part.bin is damaged: its size differs from that in part.idx"),
        (index, struct.pack("<H", 999) + tokens[2:], "part.bin has the token id 999, but the dictionary has ids 0 to"),
    ):
        (tmp_path / "part.idx").write_bytes(new_index)
        (tmp_path / "part.bin").write_bytes(new_tokens)
        assert expected in message(part)
    (tmp_path / "part.bin").unlink()
    assert "cannot read" in message(part)
    other = tmp_path / "dict.other"
    other.write_text("word1 5\nword0 6\n")
    assert f"belongs to another dictionary, {listed}" in message(data, by=other)
    assert not (tmp_path / "t").exists()


def test_embeddings_that_are_none(data, tmp_path):
    """Damaged, of another size, none, not finite; more clusters than tokens or different rows."""
    symbols, _ = read_dictionary(data / "dict.txt")

    def message(*more):
        build = ("tables", "build", data / "dict.txt", "--num-experts", 2, "--out", tmp_path / "t")
        return refused(*build, "--builder", "dispersed", "--embeddings", path, *more).removeprefix("fairseq-hash: ")

    path = tmp_path / "c.pt"
    path.write_bytes(b"nonsense")
    assert f"{path} is damaged or no checkpoint" in message()
    torch.save({"model": {"decoder.other": torch.zeros(3)}}, path)
    assert "has no decoder.embed_tokens.weight; give a checkpoint of a language model" in message()
    embeddings(path, symbols[1:])
    assert f"has embeddings of {len(symbols) - 1} symbols, but the dictionary has {len(symbols)}" in message()
    torch.save({"model": {"decoder.embed_tokens.weight": torch.full((len(symbols), 2), torch.nan)}}, path)
    assert "has embeddings that are not finite" in message()
    assert not (tmp_path / "t").exists()


def test_more_clusters_than_tokens(data, tmp_path):
    """The note on the checkpoint comes first, as it says of no dictionary."""
    path = embeddings(tmp_path / "c.pt", read_dictionary(data / "dict.txt")[0])
    build = ("tables", "build", data / "dict.txt", "--num-experts", 2, "--out", tmp_path / "t", "--embeddings", path)
    status, out, err = call(*build, "--builder", "dispersed", "--clusters", 9999)
    assert status == 1 and err.startswith("fairseq-hash: 9999 clusters of ") and err.count("\n") == 1
    assert not (tmp_path / "t").exists()


def test_words_need_marks(dictionary, tmp_path):
    """Neither dictionary here marks where words begin."""
    build = ("tables", "build", dictionary, "--num-experts", 2, "--builder", "random", "--out", tmp_path / "t")
    message = refused(*build, "--feature", "word", "--words", dictionary)
    assert "the dictionary marks no words" in message and "--feature word needs pieces" in message


def test_show_and_compare_refusals(dictionary, tmp_path):
    """No file, another file, another dictionary: other words, or the same in another order; what cannot be judged."""
    file = tmp_path / "t"
    done("build", dictionary, "--num-experts", 2, "--out", file)
    assert str(tmp_path / "none") in refused("tables", "show", tmp_path / "none", dictionary)
    assert "does not exist" in refused("tables", "show", file, tmp_path / "none")
    assert "is damaged or no table file" in refused("tables", "show", dictionary, dictionary)
    (tmp_path / "cut").write_bytes(file.read_bytes()[:-9])
    assert "cut is damaged or no table file" in refused("tables", "show", tmp_path / "cut", dictionary)
    other = tmp_path / "other.txt"
    for words in (("the", "of", "and", "hash", "other"), reversed(WORDS)):
        other.write_text("".join(f"{word} 5\n" for word in words))
        message = refused("tables", "compare", file, file, other)
        assert message.startswith(f"fairseq-hash: {file} was built for another dictionary than {other}")
    assert "alone is nothing to compare" in refused("tables", "compare", dictionary)
    assert "leave one out" in refused("tables", "show", file, dictionary, "--counts", "a", "--text", "b")
    assert "is out of range" in refused("tables", "show", file, dictionary, "--tokens-per-sample", -1)

    options = ["build", dictionary, "--num-experts", 2, "--builder", "random", "--out"]
    text = tmp_path / "text"
    text.write_text("the of\n")
    done(*options, tmp_path / "bigram", "--feature", "bigram", "--keys", 9)
    message = refused("tables", "show", tmp_path / "bigram", dictionary)
    assert "is a table of bigram, which a dictionary does not count; give --text or --held-out" in message
    assert "held-out text" in done("show", tmp_path / "bigram", dictionary, "--held-out", text)
    done(*options, tmp_path / "position", "--feature", "position", "--keys", 9)
    message = refused("tables", "show", tmp_path / "position", dictionary, "--text", text)
    assert "is a table of positions; give --tokens-per-sample" in message
    done(*options, tmp_path / "predicted", "--feature", "predicted")
    message = refused("tables", "show", tmp_path / "predicted", dictionary, "--text", text)
    assert "is a table of predicted tokens, which no text has; judge it by --counts" in message
