"""`fairseq-hash tables show` on other frameworks' tensors: builders recognised, problems named, padding, overlaps."""

import numpy as np
import pytest
from called import call, refused
from made_tables import done, judged, naive_loads
from safetensors.numpy import save_file

from fairseq_hash.hashing import load_table
from fairseq_hash.hashing.builders import balanced_experts, modulo_experts, random_experts, round_robin_experts
from fairseq_hash.hashing.dictionary import read_dictionary
from fairseq_hash.table_tools.forensics import builder_of, overlaps, problems

EXPERTS, ROWS = 16, 4000
ZIPF = np.maximum(100_000 // np.arange(1, ROWS + 1), 1)
GENERATOR = np.random.default_rng(3)


def drawn(columns):
    """Rows of distinct experts, drawn by NumPy."""
    return GENERATOR.random((ROWS, EXPERTS)).argsort(axis=1)[:, :columns]


def crowded():
    """Draws that favour some experts, as a router does."""
    return (GENERATOR.random((ROWS, EXPERTS)) ** np.linspace(1, 2, EXPERTS)).argsort(axis=1)[:, -2:]


def shuffled_deal():
    """Equal numbers of rows, in a random order."""
    return GENERATOR.permutation(np.arange(ROWS) % EXPERTS)[:, None]


@pytest.mark.parametrize(
    ("expert_VK", "expected"),
    [
        (modulo_experts(ROWS, EXPERTS, 2), "modulo: "),
        (round_robin_experts(ROWS, EXPERTS, 3)[:, ::-1], "round-robin: "),
        (balanced_experts(ZIPF, EXPERTS, 2), "balanced by these counts (100.0% of the rows)"),
        (balanced_experts(ZIPF, EXPERTS, 2, seed=7), "balanced by frequency"),
        (random_experts(ROWS, EXPERTS, 2, seed=42), "random, seed 42, as this package draws it"),
        (drawn(1), "random: the experts' numbers"),
        (drawn(6), "random: the experts' numbers"),
        (shuffled_deal(), "an even deal"),
        (crowded(), "none of these"),
    ],
    ids=str,
)
def test_builders_are_recognised(expert_VK, expected):
    assert builder_of(expert_VK, EXPERTS, ZIPF).startswith(expected)


def test_builders_with_other_rows_and_without_counts():
    """Some rows of added tokens change nothing; without counts nothing is said of balance."""
    modulo = modulo_experts(ROWS, EXPERTS, 2)
    modulo[-9:] = 0, 1
    assert builder_of(modulo, EXPERTS) == "modulo: (token id + k) mod E (99.8% of the rows)"
    assert builder_of(balanced_experts(ZIPF, EXPERTS), EXPERTS).startswith(("random: ", "none", "an even"))


def test_problems_by_hand():
    good = modulo_experts(20, 5, 3)
    assert problems(good, 5, 20) == []
    bad = good.copy()
    bad[3, 1], bad[7, 0], bad[9] = 5, -1, (2, 4, 2)
    assert problems(bad, 5, 22) == [
        f"2 rows name an expert out of range (row 3: {bad[3, 1]}; there are experts 0 to 4)",
        "1 rows name an expert twice (row 9: [2, 4, 2]); the K experts of a token must differ",
        "the table has 20 rows for 22 symbols; the last symbols have no experts",
    ]


def test_overlaps_by_hand():
    one, other = random_experts(500, 8, 3, 1), random_experts(500, 8, 3, 2)
    shared = sum(len({*a} & {*b}) for a, b in zip(one.tolist(), other.tolist(), strict=True)) / 500
    same = sum({*a} == {*b} for a, b in zip(one.tolist(), other.tolist(), strict=True)) / 500
    lines = overlaps({"a": one, "b": other, "c": one[:, ::-1], "d": one[:9]}, 8)
    assert len(lines) == 6
    assert lines[0] == (
        f"a and b: {shared:.2f} of 3 experts of a row are in both (by chance 1.12); {same:.1%} of the rows have the "
        "same experts"
    )
    assert lines[1].startswith("a and c: 3.00 of 3") and lines[1].endswith("100.0% of the rows have the same experts")
    assert lines[2] == "a and d: shapes [500, 3] and [9, 3]"


@pytest.fixture
def built(tmp_path):
    """A dictionary of 25 symbols, and a table of it with 3 of 7 experts a token."""
    listed = tmp_path / "dict.txt"
    listed.write_text("".join(f"word{number} {100 - number}\n" for number in range(21)))
    done("build", listed, "--num-experts", 7, "--experts-per-token", 3, "--out", tmp_path / "table")
    return listed, tmp_path / "table"


def test_a_file_of_several_layers(built, tmp_path):
    """Of int32, padded to 32 rows, layer 10 after layer 9: what is said, and loads by hand."""
    listed, table = built
    symbols, counts = read_dictionary(listed)
    expert_VK = load_table(table).expert_HK.astype(np.int32)
    pad = np.tile(np.arange(3, dtype=np.int32), (7, 1))
    tensors = {f"layers.{layer}.tid2eid": np.concatenate([(expert_VK + layer) % 7, pad]) for layer in (10, 9)}
    save_file(tensors, tmp_path / "t")
    lines = done("show", tmp_path / "t", listed, "--out", tmp_path / "out").splitlines()
    assert lines[0] == "note: 7 experts, by the largest number in the file; --num-experts states their number"
    assert lines[1].startswith("layers.9.tid2eid: 32 rows of 3 of 7 experts; looks like balanced by")
    assert lines[2] == "layers.9.tid2eid: 7 rows after the vocabulary's 25, as padding or for added tokens"
    assert lines[3].startswith("layers.10.tid2eid: 32 rows of 3 of 7")
    assert lines[5].startswith("layers.9.tid2eid and layers.10.tid2eid: ")
    one, other = judged(tmp_path / "out")
    assert one["counts"]["loads"] == naive_loads(((expert_VK + 9) % 7).tolist(), counts, 7)
    assert other["counts"]["loads"] == naive_loads(((expert_VK + 10) % 7).tolist(), counts, 7)
    # In another vocabulary's order, and without a dictionary.
    vocabulary = tmp_path / "v"
    vocabulary.write_text("".join(f"{symbol}\n" for symbol in symbols[::-1]))
    save_file({"tid2eid": expert_VK[::-1].copy()}, tmp_path / "back")
    out = done("show", tmp_path / "back", listed, "--vocabulary", vocabulary, "--num-experts", 7)
    assert out.startswith("tid2eid: 25 rows of 3 of 7 experts; looks like balanced by") and "largest load / mean" in out
    out = done("show", tmp_path / "back", "--num-experts", 8)
    assert out.startswith("tid2eid: 25 rows of 3 of 8 experts; looks like ") and out.count("\n") == 1


def test_problems_are_printed_line_by_line(built, tmp_path):
    listed, table = built
    expert_VK = load_table(table).expert_HK.copy()
    expert_VK[2, 0], expert_VK[5] = 9, (1, 1, 2)
    np.save(tmp_path / "t.npy", expert_VK[:-1])
    code, out, err = call("tables", "show", tmp_path / "t.npy", listed, "--num-experts", 7)
    lines = [line for line in out.splitlines() if line.startswith("problem: t.npy: ")]
    assert code == 1 and len(lines) == 3 and "looks like" not in out
    assert f"{tmp_path / 't.npy'} has 3 problems, printed above; tables import refuses such a table" in err
    np.save(tmp_path / "t.npy", expert_VK.astype(np.float32))
    assert "is of type float32; a table is of int64 or int32" in refused("tables", "show", tmp_path / "t.npy")


def test_what_does_not_go_together(built, tmp_path):
    listed, table = built
    np.save(tmp_path / "t.npy", load_table(table).expert_HK)
    assert "--num-experts is for tables of other frameworks" in refused(
        "tables", "show", table, listed, "--num-experts", 7
    )
    assert "needs DICT, too" in refused("tables", "show", table)
    assert "--vocabulary needs DICT, too" in refused("tables", "show", tmp_path / "t.npy", "--vocabulary", listed)
    assert "--num-experts -1 is out of range" in refused("tables", "show", tmp_path / "t.npy", "--num-experts", -1)
    assert "--pad-to-multiple 0 is out of range" in refused(
        "tables", "export", table, "--pad-to-multiple", 0, "--out", tmp_path / "o"
    )


def test_padding_goes_out_and_comes_back(built, tmp_path):
    """To a multiple of 16: 25 rows become 32, and with --padded they are the very table again."""
    listed, table = built
    expert_VK = load_table(table).expert_HK
    out = done("export", table, "--pad-to-multiple", 16, "--out", tmp_path / "t.npy")
    assert out.endswith("note: the last 7 of 32 rows are padding\n")
    rows = np.load(tmp_path / "t.npy")
    assert rows.shape == (32, 3) and np.array_equal(rows[:25], expert_VK) and problems(rows, 7, 25) == []
    assert "note" not in done("export", table, "--pad-to-multiple", 5, "--out", tmp_path / "same")
    back = ["import", tmp_path / "t.npy", listed, "--num-experts", 7, "--out", tmp_path / "back"]
    message = "has 32 rows, but the dictionary has 25 symbols; give the dictionary of this table"
    line = refused("tables", *back)
    assert message in line and line.endswith("if the last rows are padding, add --padded")
    done(*back, "--padded")
    assert load_table(tmp_path / "back").fingerprint == load_table(table).fingerprint
