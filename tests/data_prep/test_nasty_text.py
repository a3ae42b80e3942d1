"""Text that the tools in the chain could see differently: odd white space and line ends, words that fairseq keeps.

Line reading, SentencePiece, the dictionary, fairseq's binarizer and its reader must agree on every token.
"""

import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
from fairseq.data import Dictionary, indexed_dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep import pieces, text
from data_prep.binarize import binarize, make_dictionary
from data_prep.cli import main
from data_prep.verify import check_counts
from fairseq_hash.api.tokenizer import Pieces, Words
from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing.dictionary import read_dictionary

SPLITS = ("train", "valid", "test")
SPACES = "\t\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2003\u2009\u2028\u2029\u202f\u205f\u3000"
ZERO_WIDTH = "\u200b\u200c\u200d\u200e\u2060\ufeff\xad\x00\x7f\x9f"
LETTERS = "ab1.<>é▁▅ßﬁ漢\U0001f600"
WORDS = ("<s>", "</s>", "<pad>", "<unk>", "<mask>", "madeupword0000", "madeupword0001", "#fairseq:overwrite", "<0x41>")
NASTY = st.lists(st.one_of(st.sampled_from([*SPACES, *ZERO_WIDTH, *LETTERS, *WORDS, " ", " "]), st.text(max_size=3)))
LINES = st.lists(NASTY.map("".join).map(lambda line: line.replace("\n", "")), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model trained on such text itself, so that it would have odd pieces if it could."""
    folder = tmp_path_factory.mktemp("model")
    line = f"ab{SPACES}ab {' '.join(WORDS)} a{'a'.join(SPACES)}b x{'x'.join(WORDS)} {LETTERS}"
    (folder / "sample.txt").write_text("\n".join(map(pieces.plain, [line] * 50)), encoding="utf-8")
    pieces.train_model(folder / "sample.txt", folder / "sentencepiece.model", 340)
    return folder / "sentencepiece.model"


def written_and_read(lines, model, folder):
    """Take lines of train and valid the whole way to the files and back; return tokens written and read."""
    pieces.load(model and str(model))
    counted = {split: pieces.count(lines[split]) for split in lines}
    totals, counts = ({split: pair[i] for split, pair in counted.items()} for i in (0, 1))
    dictionary = make_dictionary(counts["train"], model and pieces.model_pieces(model), None, 2 if model is None else 1)
    dictionary.save(str(folder / "dict.txt"))
    loaded = Dictionary.load(str(folder / "dict.txt"))
    assert loaded.symbols == dictionary.symbols and loaded.count[4:] == dictionary.count[4:]
    assert read_dictionary(folder / "dict.txt")[0] == loaded.symbols
    pieces.load(model and str(model), loaded.indices)
    rows = {}
    for split in lines:
        unknown = sum(count for token, count in counts[split].items() if token not in loaded.indices)
        totals[split]["unknown"] = unknown + counts[split]["<unk>"]
        binarize([pieces.ids_of(lines[split])], len(loaded), folder / split)
        check_counts(folder / split, folder / "dict.txt", totals[split], counted=split == "train")
        data = indexed_dataset.make_dataset(str(folder / split), "mmap")
        read = [[loaded[token] for token in data[n].tolist()] for n in range(len(data))]
        assert all(row[-1] == "</s>" and "</s>" not in row[:-1] for row in read)
        written = pieces.tokens_of(lines[split])
        for row, n in zip(written, range(len(data)), strict=True):  # as fairseq's own binarizer reads them
            assert data[n].tolist() == loaded.encode_line(" ".join(row), add_if_not_exist=False).tolist()
        rows[split] = written, [row[:-1] for row in read]
        found = Counter(token for row in rows[split][1] for token in row)
        if split == "train":
            assert all(found[symbol] == loaded.count[i] for i, symbol in enumerate(loaded.symbols) if i > 3)
        assert found["<unk>"] == totals[split]["unknown"] and sum(found.values()) == totals[split]["tokens"]
    pieces.load(None)
    return rows, loaded


@given(train=LINES, valid=LINES)
@settings(max_examples=40)
@example(train=["a a madeupword0000"], valid=["madeupword0001"])  # rare, and one that fills up the dictionary
def test_words_written_are_words_read(train, valid):
    with tempfile.TemporaryDirectory() as folder:
        rows, dictionary = written_and_read({"train": train, "valid": valid}, None, Path(folder))
    for split, lines in (("train", train), ("valid", valid)):
        written, read = rows[split]
        kept = [["<unk>" if word in ("<s>", "<pad>", "</s>") else word for word in line.split()] for line in lines]
        assert written == kept
        assert read == [[word if word in dictionary.indices else "<unk>" for word in row] for row in written]


@given(train=LINES, valid=LINES)
@settings(max_examples=40)
def test_pieces_written_are_pieces_read(model, train, valid):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    with tempfile.TemporaryDirectory() as folder:
        rows, _ = written_and_read({"train": train, "valid": valid}, model, Path(folder))
    for split, lines in (("train", train), ("valid", valid)):
        written, read = rows[split]
        assert written == read
        spaced = ["".join(" " if character.isspace() else character for character in line) for line in lines]
        assert [processor.decode(row) for row in read] == [processor.decode(processor.encode(line)) for line in spaced]


def test_no_character_but_known_ones_leaves_white_space_in_a_piece(model):
    """Of all of Unicode: after `plain`, SentencePiece's own normalisation gives nothing that `str.split` splits at."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    everything = [chr(code) for code in range(1, 0x110000) if not 0xD800 <= code < 0xE000]
    lines = ["a".join(everything[start : start + 4096]) for start in range(0, len(everything), 4096)]
    assert [line for line in lines if len(processor.normalize(pieces.plain(line)).split()) > 1] == []
    assert any(len(processor.normalize(line).split()) > 1 for line in lines)  # without it, U+0085


def test_no_piece_is_a_word_that_fairseq_keeps(model):
    assert not {*pieces.RESERVED, "<unk>"} & set(pieces.model_pieces(model))


def test_a_line_with_the_trainers_own_character_is_trained_on(tmp_path):
    """SentencePiece leaves lines with U+2585 out; where all have it, it would train on nothing."""
    (tmp_path / "sample.txt").write_text("some▅words here\n" * 20, encoding="utf-8")
    pieces.train_model(tmp_path / "sample.txt", tmp_path / "model", 280)
    assert "▁w" in {piece[:2] for piece in pieces.model_pieces(tmp_path / "model")}


NASTY_LINES = [
    "one\x85two\u2028three\u2029four\vfive\fsix\x1cseven\x1deight\x1enine",
    "ten\xa0eleven\u3000twelve\rthirteen\u200bfourteen \ufefffifteen\r",
    "<s> x <pad> y </s> z <unk> <mask> madeupword0000 #fairseq:overwrite",
    "",
    "\x85",
    "a word 12",
]


def write_files(folder):
    files = []
    for split in SPLITS:
        path = folder / f"{split}.txt"
        path.write_bytes("".join(line + "\n" for line in NASTY_LINES * 20).encode())
        files += [f"--{split}", str(path)]
    return files


@pytest.mark.parametrize("ways", [("--words",), ("--vocab-size", "320")], ids=["words", "pieces"])
def test_the_command_keeps_every_token(tmp_path, in_one_process, capsys, ways):
    """The command: as many tokens in .idx as were written, words as Python splits."""
    files = write_files(tmp_path)
    out = tmp_path / "data"
    assert main(["text", *files, "--out", str(out), "--workers", "1", *ways]) == 0
    said = capsys.readouterr().out
    totals = json.loads((out / "provenance.json").read_text())["splits"]["train"]
    data = indexed_dataset.make_dataset(str(out / "train"), "mmap")
    assert len(data) == totals["lines"] == 120
    assert int(data.sizes.sum()) == totals["tokens"] + totals["lines"]
    dictionary = Dictionary.load(str(out / "dict.txt"))
    rows = [[dictionary[token] for token in data[n].tolist()[:-1]] for n in range(6)]
    if "--words" in ways:
        told = "train: 60 words are <unk>: fairseq's dictionary keeps <s>, <pad>, </s> for itself"
        assert told in said and totals["reserved"] == 60 and totals["unknown"] == 80
        assert rows[0] == "one two three four five six seven eight nine".split()
        assert rows[2] == "<unk> x <unk> y <unk> z <unk> <mask> madeupword0000 #fairseq:overwrite".split()
    else:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(out / "sentencepiece.model"))
        assert "are <unk>" not in said and totals["reserved"] == totals["unknown"] == 0
        text_of = [processor.decode(row) for row in rows]
        assert text_of[0] == "one two three four five six seven eight nine"
        assert text_of[1] == "ten eleven twelve thirteen fourteen fifteen"
        assert text_of[2] == NASTY_LINES[2] and text_of[3:] == ["", "", "a word 12"]


def test_only_newlines_end_lines(tmp_path):
    files = write_files(tmp_path)
    lines = list(text.read_lines([Path(files[1])], lambda done: None))
    assert lines[:6] == [line.rstrip("\r") for line in NASTY_LINES]


def binarized(folder):
    """Two lines, binarized, with what was written; `b` is unknown."""
    folder.mkdir()
    dictionary = make_dictionary(Counter({"a": 3}), None, None, 1)
    dictionary.save(str(folder / "dict.txt"))
    pieces.load(None, dictionary.indices)
    binarize([pieces.ids_of(["a b a", "a"])], len(dictionary), folder / "train")
    return folder / "train", folder / "dict.txt", {"lines": 2, "tokens": 4, "unknown": 1}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lines": 3, "tokens": 3}, "has 2 lines, but 3 were written"),
        ({"tokens": 5}, "has 6 tokens with the ends of lines, but 7 were written"),
        ({"unknown": 0}, "has 1 unknown tokens, but 0 were written"),
    ],
)
def test_other_tokens_than_were_written_are_refused(tmp_path, changed, said):
    data, dictionary, totals = binarized(tmp_path / "data")
    check_counts(data, dictionary, totals, counted=True)
    with pytest.raises(UserError, match=said) as error:
        check_counts(data, dictionary, {**totals, **changed}, counted=True)
    assert "\n" not in str(error.value)


def test_other_counts_than_the_dictionarys_are_refused(tmp_path):
    data, dictionary, totals = binarized(tmp_path / "data")
    dictionary.write_text("a 2\nmadeupword0000 1\nmadeupword0001 0\nmadeupword0002 0\n")
    with pytest.raises(UserError, match="train has 3 times 'a', but 2 were written"):
        check_counts(data, dictionary, totals, counted=True)
    check_counts(data, dictionary, totals, counted=False)  # of another text, as with --like


def test_a_torn_file_is_refused(tmp_path):
    data, dictionary, totals = binarized(tmp_path / "data")
    data.with_suffix(".bin").write_bytes(data.with_suffix(".bin").read_bytes()[:-2])
    with pytest.raises(UserError, match="has 5 tokens in its .bin, but 6 were written"):
        check_counts(data, dictionary, totals, counted=True)
    data.with_suffix(".bin").write_bytes(b"\xff\xff" * 6)
    with pytest.raises(UserError, match="has a token that is not a symbol"):
        check_counts(data, dictionary, totals, counted=True)


@settings(max_examples=40)
@given(lines=LINES)
@example(lines=["a\x85b </s> <pad>\v<s>"])
def test_a_loaded_model_reads_text_as_the_data_was_made(model, lines):
    """`fairseq_hash.load`, `sample` and `experts` cut text as `data_prep` did."""
    for path, tokenizer in ((None, Words()), (model, Pieces(model))):
        pieces.load(path and str(path))
        assert list(map(tokenizer.encode, lines)) == pieces.tokens_of(lines)
    pieces.load(None)
