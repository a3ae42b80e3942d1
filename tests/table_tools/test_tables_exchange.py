"""`fairseq-hash tables export` and `import`: other frameworks' tensors, in the order of their vocabularies."""

import random

import numpy as np
import pytest
from called import call, refused
from made_tables import done
from safetensors import safe_open
from safetensors.numpy import save_file

from fairseq_hash.hashing import load_table
from fairseq_hash.hashing.builders import random_experts
from fairseq_hash.hashing.dictionary import read_dictionary


@pytest.fixture
def built(tmp_path):
    """A dictionary of 21 words, and a table of it with 3 of 7 experts a token."""
    listed = tmp_path / "dict.txt"
    listed.write_text("".join(f"\u2581word{number} {100 - number}\n" for number in range(20)) + "x y 3\n")
    done("build", listed, "--num-experts", 7, "--experts-per-token", 3, "--out", tmp_path / "table")
    return listed, tmp_path / "table"


@pytest.mark.parametrize("suffix", ["safetensors", "npy"])
@pytest.mark.parametrize("scored", [True, False])
def test_round_trip(built, tmp_path, suffix, scored):
    """Rows in the order of a SentencePiece .vocab or of a list of symbols, and back to the very table."""
    listed, table = built
    symbols = read_dictionary(listed)[0]
    order = symbols.copy()
    random.Random(1).shuffle(order)
    vocabulary = tmp_path / "v.vocab"
    lines = [f"{symbol}\t-{row}.5\n" if scored else f"{symbol}\n" for row, symbol in enumerate(order)]
    vocabulary.write_text("".join(lines))
    out = tmp_path / f"out.{suffix}"
    assert done("export", table, listed, "--vocabulary", vocabulary, "--out", out) == f"wrote {out}\n"
    expert_VK = load_table(table).expert_HK
    if suffix == "npy":
        rows = np.load(out)
    else:
        with safe_open(out, framework="np") as file:
            assert list(file.keys()) == ["tid2eid"] and file.metadata()["num_experts"] == "7"
            rows = file.get_tensor("tid2eid")
    assert rows.dtype == np.int64
    assert rows.tolist() == [expert_VK[symbols.index(symbol)].tolist() for symbol in order]
    back = ["import", out, listed, "--num-experts", 7, "--vocabulary", vocabulary, "--out", tmp_path / "back"]
    said = done(*back)
    assert said.startswith(f"wrote {tmp_path / 'back'}\n") and "largest load / mean" in said
    again = load_table(tmp_path / "back")
    assert again.fingerprint == load_table(table).fingerprint and again.record.builder == "imported"
    assert "imported" in done("show", tmp_path / "back", listed)


def test_without_a_vocabulary(built, tmp_path):
    """The dictionary's own order; the table is the same as the exported one, of int32 and by a longer name, too."""
    listed, table = built
    done("export", table, "--out", tmp_path / "a")
    done("import", tmp_path / "a", listed, "--num-experts", 7, "--out", tmp_path / "b")
    expert_VK = load_table(table).expert_HK
    assert np.array_equal(load_table(tmp_path / "b").expert_HK, expert_VK)
    narrow = {"layers.0.gate.tid2eid": expert_VK.astype(np.int32), "layers.0.gate.weight": np.zeros(2, np.float32)}
    save_file(narrow, tmp_path / "c")
    done("import", tmp_path / "c", listed, "--num-experts", 7, "--out", tmp_path / "b", "--overwrite")
    assert np.array_equal(load_table(tmp_path / "b").expert_HK, expert_VK)
    save_file({**narrow, "layers.1.gate.tid2eid": (expert_VK + 1) % 7}, tmp_path / "c")
    message = refused("tables", "import", tmp_path / "c", listed, "--num-experts", 7, "--out", tmp_path / "d")
    both = "layers.0.gate.tid2eid, layers.1.gate.tid2eid"
    assert f"has 2 tensors ({both}) whose name ends in tid2eid; name one" in message
    name = ["--tensor", "layers.1.gate.tid2eid"]
    done("import", tmp_path / "c", listed, "--num-experts", 7, *name, "--out", tmp_path / "d")
    assert np.array_equal(load_table(tmp_path / "d").expert_HK, (expert_VK + 1) % 7)


def test_symbols_that_one_side_lacks(built, tmp_path):
    """They have experts of `random_experts`, and their number is said."""
    listed, table = built
    symbols, expert_VK = read_dictionary(listed)[0], load_table(table).expert_HK
    vocabulary = tmp_path / "vocabulary"
    wanted = ["new", symbols[6], "newer", symbols[4]]
    vocabulary.write_text("\n".join(wanted) + "\n")
    out = done("export", table, listed, "--vocabulary", vocabulary, "--seed", 5, "--out", tmp_path / "o.npy")
    assert out.startswith(f"note: 2 of 4 symbols of {vocabulary} are not in the dictionary; they have random experts\n")
    drawn = random_experts(4, 7, 3, 5)
    expected = np.stack([drawn[0], expert_VK[6], drawn[2], expert_VK[4]])
    assert np.load(tmp_path / "o.npy").tolist() == expected.tolist()
    back = ["import", tmp_path / "o.npy", listed, "--num-experts", 7, "--vocabulary", vocabulary, "--seed", 6]
    out = done(*back, "--out", tmp_path / "back")
    assert out.startswith(f"note: 23 of 25 symbols of {listed} are not in the vocabulary; they have random experts\n")
    rows, drawn = load_table(tmp_path / "back").expert_HK, random_experts(25, 7, 3, 6)
    for row, symbol in enumerate(symbols):
        assert np.array_equal(rows[row], expert_VK[row] if symbol in wanted else drawn[row])


def bad_rows(kind):
    good = np.arange(25 * 3).reshape(25, 3) % 7
    return {
        "twice": np.where(np.arange(25)[:, None] == 9, np.array([1, 5, 1]), good),
        "beyond": good + 1,
        "below": good - 1,
        "rows": good[:-1],
        "floats": good.astype(np.float32),
        "flat": good[:, 0].copy(),
        "empty": good[:0],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("twice", "the hash table names an expert twice for one token (row 9: [1, 5, 1])"),
        ("beyond", "the hash table names expert 7, but there are experts 0 to 6"),
        ("below", "the hash table names expert -1, but there are experts 0 to 6"),
        ("rows", "tid2eid has 24 rows, but the dictionary has 25 symbols"),
        ("floats", "is of type F32; a table is of int64 or int32"),
        ("flat", "has shape [25]; a table has [vocabulary, experts per token]"),
        ("empty", "has shape [0, 3]; a table has [vocabulary, experts per token]"),
    ],
)
def test_tensors_that_are_no_table(built, tmp_path, kind, message):
    listed, _ = built
    before = sorted(tmp_path.iterdir())
    save_file({"tid2eid": bad_rows(kind)}, tmp_path / "in")
    arguments = ["tables", "import", tmp_path / "in", listed, "--num-experts", 7, "--out", tmp_path / "out"]
    assert message in refused(*arguments)
    np.save(tmp_path / "in.npy", bad_rows(kind))
    arguments[2] = tmp_path / "in.npy"
    assert message.replace("tid2eid", "in.npy").replace("F32", "float32") in refused(*arguments)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "in", tmp_path / "in.npy"])


def test_import_refusals(built, tmp_path):
    listed, table = built

    def message(file, *more, experts=7):
        return refused("tables", "import", file, listed, "--num-experts", experts, "--out", tmp_path / "o", *more)

    assert "none does not exist; give a file of safetensors, or .npy" in message(tmp_path / "none")
    assert "is damaged or no safetensors file" in message(listed)
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY")
    assert "is damaged or no .npy file" in message(tmp_path / "bad.npy")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "is damaged or no .npy file" in message(tmp_path / "objects.npy")
    assert "has one tensor without a name" in message(tmp_path / "bad.npy", "--tensor", "x")
    assert "has no tensor whose name ends in tid2eid; name one by --tensor" in message(table)
    assert "has no tensor x; it has expert" in message(table, "--tensor", "x")
    assert "--num-experts 0 is out of range" in message(table, experts=0)
    assert "--seed -1 is out of range" in message(table, "--seed", "-1")
    vocabulary = tmp_path / "v"
    for content, expected in (
        ("", "is an empty vocabulary"),
        ("a\nb\na\n", "has the symbol 'a' in lines 1 and 3"),
        ("a\nb\n", "has 25 rows, but the vocabulary has 2 symbols"),
        ("".join(f"other{row}\n" for row in range(25)), "the vocabulary and the dictionary have no symbol in common"),
    ):
        vocabulary.write_text(content)
        assert expected in message(table, "--tensor", "expert", "--vocabulary", vocabulary)
    vocabulary.write_bytes(b"caf\xe9\n")
    said = message(table, "--tensor", "expert", "--vocabulary", vocabulary)
    assert "is no vocabulary: it is not text in UTF-8" in said
    assert not (tmp_path / "o").exists()


def test_only_tables_of_token_ids_are_exported(built, tmp_path):
    """Not features, pairs or MultiHash; and no vocabulary without the dictionary."""
    listed, table = built
    text = tmp_path / "text"
    text.write_text("\u2581word1 \u2581word2 \u2581word1 \u2581word3 \u2581word1\n" * 9)
    kinds = {
        "previous": (["--feature", "previous"], "is a table of previous; only tables of token ids can be exported"),
        "hashes": (["--multi-hash", 2], "is a table of MultiHash"),
        "spread": (["--builder", "spread", "--text", text], "has pairs of tokens as keys (spread)"),
    }
    for name, (options, message) in kinds.items():
        done("build", listed, "--num-experts", 4, *options, "--out", tmp_path / name)
        assert message in refused("tables", "export", tmp_path / name, "--out", tmp_path / "o")
    said = refused("tables", "export", table, "--vocabulary", listed, "--out", tmp_path / "o")
    assert "--vocabulary needs DICT, too" in said
    assert "does not exist; give a table file" in refused("tables", "export", tmp_path / "no", "--out", tmp_path / "o")
    assert "--out " in refused("tables", "export", table, "--out", table)
    assert call("tables", "export", table, "--out", table, "--overwrite")[0] == 0
    assert not (tmp_path / "o").exists()


def test_a_full_disc(built, tmp_path, monkeypatch):
    """What stood under the name is still there, and nothing else is."""

    def fill(file, array):
        file.write(b"part")
        raise OSError(28, "No space left on device")

    _, table = built
    (tmp_path / "o.npy").write_bytes(b"before")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(np, "save", fill)
    message = refused("tables", "export", table, "--overwrite", "--out", tmp_path / "o.npy")
    assert message.startswith(f"fairseq-hash: cannot write {tmp_path / 'o.npy'} (") and "No space left" in message
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "o.npy").read_bytes() == b"before"
