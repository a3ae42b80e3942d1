"""What `fairseq-hash tables` counts in dictionaries, files of counts and text, beside naive recounts."""

from collections import Counter

import pytest
import reference
from called import shown
from fairseq.data import Dictionary
from made_tables import assert_figures, done, judged, naive_loads, stream_of

from fairseq_hash.hashing import load_table
from fairseq_hash.hashing.dictionary import PADDING, read_dictionary
from fairseq_hash.hashing.words import polynomial_hash
from fairseq_hash.table_tools import token_streams as texts


def test_dictionaries_are_those_of_fairseq(tmp_path, data):
    """Symbols, counts and ids, of overwritten symbols and of those that look odd, too."""
    path = tmp_path / "dict.txt"
    path.write_text("a 5\nb c 4\n\u00a0x 3\n# 2\n<unk> 7 #fairseq:overwrite\na 1 #fairseq:overwrite\n\u2581 0\n")
    for file in (path, data / "dict.txt"):
        theirs = Dictionary.load(str(file))
        assert read_dictionary(file) == (theirs.symbols, theirs.count)


FEATURES = [("token", 0), ("previous", 0), ("bigram", 0), ("ngram", 3), ("history", 2), ("future", 0)]


@pytest.mark.parametrize(("feature", "length"), FEATURES)
@pytest.mark.parametrize("block", [5, pytest.param(1 << 20, marks=pytest.mark.slow)])
def test_keys_of_a_text_are_counted(data, tmp_path, monkeypatch, feature, length, block):
    """The same from a file of symbols, a binarized text and a data folder, in blocks of any size, and naively."""
    monkeypatch.setattr(texts, "BLOCK", block)
    symbols, _ = read_dictionary(data / "dict.txt")
    source = data.parent / "valid.txt"
    options = ["build", data / "dict.txt", "--num-experts", 4, "--feature", feature, "--seed", 3]
    options += ["--keys", 50] if feature in ("bigram", "ngram", "history") else []
    options += ["--length", length] if length else []
    found = set()
    ways = (source,), (data / "valid",), (data, "--subset", "valid")
    for number, text in enumerate(ways):
        done(*options, "--text", *text, "--out", tmp_path / f"{number}")
        table = load_table(tmp_path / f"{number}")
        found.add((table.fingerprint, table.record.counts_fingerprint))
    assert len(found) == 1
    done("show", tmp_path / "0", data / "dict.txt", "--text", source, "--out", tmp_path / "out")
    (on,) = judged(tmp_path / "out")
    num_keys = 50 if feature in ("bigram", "ngram", "history") else len(symbols)
    rows = reference.feature_rows(stream_of(source, symbols), feature, length, PADDING, num_keys)
    uses = Counter(rows)
    counts = [uses[row] for row in range(num_keys)]
    assert_figures(on["building counts"], naive_loads(table.expert_HK.tolist(), counts, 4), counts)


def test_samples_begin_anew(data, tmp_path):
    """Positions and bigrams in samples of 9 tokens, the last one shorter, naively."""
    symbols, _ = read_dictionary(data / "dict.txt")
    source = data.parent / "valid.txt"
    stream = stream_of(source, symbols)
    for feature, rows in (("position", 9), ("bigram", 64)):
        keys = ["--keys", rows] if feature == "bigram" else []
        options = ["--feature", feature, "--text", source, "--tokens-per-sample", 9, *keys]
        done("build", data / "dict.txt", "--num-experts", 3, *options, "--out", tmp_path / feature)
        out = tmp_path / f"{feature}.out"
        done("show", tmp_path / feature, data / "dict.txt", *options[2:6], "--out", out)
        uses = Counter()
        for start in range(0, len(stream), 9):
            uses.update(reference.feature_rows(stream[start : start + 9], feature, 0, PADDING, rows))
        counts = [uses[row] for row in range(rows)]
        table = load_table(tmp_path / feature)
        assert_figures(judged(out)[0]["building counts"], naive_loads(table.expert_HK.tolist(), counts, 3), counts)


def test_counts_of_a_file(dictionary, tmp_path):
    """They replace the dictionary's: missing symbols count 0, unknown ones are left out and told."""
    counts = tmp_path / "counts"
    counts.write_text("the\t5\nother 7\n</s> 40\n\nof 0\n")
    out = done("build", dictionary, "--num-experts", 2, "--counts", counts, "--out", tmp_path / "t")
    assert f"note: 1 symbols of {counts} are not in the dictionary; their counts are left out" in out
    table = load_table(tmp_path / "t")
    assert table.expert_HK[2] != table.expert_HK[4] and shown(out)["tokens"] == "45"
    assert "building counts" in done("show", tmp_path / "t", dictionary, "--counts", counts)
    assert "other counts" in done("show", tmp_path / "t", dictionary)


def test_unknown_symbols_of_a_text(dictionary, tmp_path):
    text = tmp_path / "text"
    text.write_text("the of what\n\nthe  why the <unk>\n")
    out = done("build", dictionary, "--num-experts", 2, "--text", text, "--out", tmp_path / "t")
    assert f"note: 2 of 10 tokens of {text} are symbols that the dictionary lacks; they are counted" in out
    done("show", tmp_path / "t", dictionary, "--text", text, "--out", tmp_path / "out")
    table = load_table(tmp_path / "t")
    counts = [0, 0, 3, 3, 3, 1, 0, 0, 0]
    one = judged(tmp_path / "out")[0]["building counts"]
    assert one["loads"] == naive_loads(table.expert_HK.tolist(), counts, 2)


def test_words_restarts_and_oracles(data, tmp_path):
    """A larger dictionary's words are keys; the best of several tables is no worse; an oracle is called one."""
    pieces, words = tmp_path / "dict.txt", tmp_path / "words.txt"
    pieces.write_text("\u2581in 9\nto 8\n\u2581a 7\nb 6\n")
    words.write_text("\u2581into 5\n\u2581ab 3\n")
    text = tmp_path / "text"
    text.write_text("\u2581in to \u2581a b to\n\u2581in\n")
    options = ["--feature", "word", "--words", words, "--text", text]
    done("build", pieces, "--num-experts", 2, *options, "--out", tmp_path / "w")
    done("show", tmp_path / "w", pieces, "--text", text, "--out", tmp_path / "out")
    symbols = read_dictionary(pieces)[0]
    known = ["\u2581into", "\u2581ab"]
    keys = reference.word_keys(stream_of(text, symbols), symbols, known)
    assert "into" in keys and "ab" in keys
    of_word = {word: len(symbols) + row for row, word in enumerate(sorted(("into", "ab"), key=polynomial_hash))}
    uses = Counter(of_word.get(key, key) for key in keys)
    table = load_table(tmp_path / "w")
    counts = [uses[row] for row in range(len(symbols) + 2)]
    one = judged(tmp_path / "out")[0]["building counts"]
    assert_figures(one, naive_loads(table.expert_HK.tolist(), counts, 2), counts)

    base = ["build", data / "dict.txt", "--builder", "random", "--num-experts", 8]
    largest = []
    for restarts in (1, 5):
        out = done(*base, "--restarts", restarts, "--out", tmp_path / f"r{restarts}")
        largest.append(float(shown(out)["largest load / mean"]))
    assert largest[1] <= largest[0] and shown(out)["restarts"] == "5"
    out = done("build", data / "dict.txt", "--feature", "future", "--num-experts", 4, "--out", tmp_path / "f")
    assert "note: --feature future is an oracle" in out and "(an oracle" in shown(out)["feature"]
    out = done("build", data / "dict.txt", "--feature", "predicted", "--num-experts", 4, "--out", tmp_path / "p")
    assert "predicted" in shown(out)["feature"]
