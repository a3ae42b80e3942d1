"""Tables that are not what they are taken for: counts that no text has, experts that get nothing, absurd sizes."""

import logging
import shutil

import numpy as np
import pytest
from called import refused
from hydra_configs import CONFIGS, needs_current_hydra
from plugin import build, train

from fairseq_hash.cli import main
from fairseq_hash.core.errors import UserError
from fairseq_hash.core.memory import check_fits, in_words, machine_bytes
from fairseq_hash.experiments.checks import check_experiment
from fairseq_hash.experiments.compose import compose
from fairseq_hash.hashing import HashTable, TableRecord, TableShape, build_table, dictionary_fingerprint, save_table
from fairseq_hash.hashing.balance import complaint, judge
from fairseq_hash.hashing.builders import equal_count
from fairseq_hash.hashing.dictionary import SPECIAL
from fairseq_hash.hashing.table import check_table_size

HASH = ("--router", "hash", "--sparse-layers", "1", "--num-experts", "4")
SWITCH = ("--router", "switch", *HASH[2:])


@pytest.fixture(scope="module")
def equal(data, tmp_path_factory):
    """The corpus with a dictionary that counts every symbol 999 times."""
    folder = tmp_path_factory.mktemp("equal") / "data"
    shutil.copytree(data, folder)
    lines = (data / "dict.txt").read_text().splitlines()
    (folder / "dict.txt").write_text("".join(f"{line.split()[0]} 999\n" for line in lines))
    return folder


def test_which_counts_are_of_no_text():
    """All alike, fillers and special symbols left out; few symbols may be alike by chance."""
    special = [1] * len(SPECIAL)
    assert equal_count([*special, *[999] * 60]) == 999
    assert equal_count([*special, *[7] * 60, 0, 0, 0]) == 7
    assert equal_count([*special, *[1] * 60]) is None  # which is no count at all
    assert equal_count([*special, *[999] * 59, 998]) is None
    assert equal_count([*special, *[5] * 15]) is None
    generator = np.random.default_rng(0)
    for _ in range(50):  # counts of real draws, even ones of evenly likely words
        text = generator.integers(0, 60, 600)
        assert equal_count([*special, *np.bincount(text, minlength=60)]) is None


def test_equal_counts_balance_nothing(data, equal, tmp_path, capsys):
    """In training, in tables build and in plan: one line with the remedy, which works."""
    line = "counts every symbol 999 times, which no text does, and --{} balance"
    for builder in ("balanced", "scattered"):
        with pytest.raises(SystemExit, match=f"the dictionary {line.format(f'hash-table {builder}')}"):
            build(equal, *HASH, "--hash-table", builder)
        words = ("tables", "build", equal / "dict.txt", "--num-experts", "4", "--builder", builder)
        error = refused(*words, "--out", tmp_path / "no.table")
        assert f"dictionary dict.txt {line.format(f'builder {builder}')}" in error and not list(tmp_path.iterdir())
    build(equal, *HASH, "--hash-table", "random")
    given = ("build", equal / "dict.txt", "--text", equal, "--num-experts", "4", "--out", tmp_path / "a.table")
    assert main(["tables", *map(str, given)]) == 0
    assert "note:" not in capsys.readouterr().out
    build(equal, *HASH, "--hash-table", tmp_path / "a.table")
    symbols = [*SPECIAL, *(f"s{number}" for number in range(60))]
    with pytest.raises(UserError, match="counts every symbol 999 times"):
        build_table("balanced", symbols, [1] * 4 + [999] * 60, TableShape(4), 0)


@needs_current_hydra
def test_plan_refuses_the_tables_that_a_run_would(equal, data, tmp_path):
    """Before a job is submitted: equal counts, and a table of another number of experts."""
    with pytest.raises(UserError, match="counts every symbol 999 times"):
        check_experiment(compose(CONFIGS, "laptop/hash", [f"task.data='{equal}'"]), 1)
    _, task, _, _ = build(data)
    known = task.source_dictionary.symbols, task.source_dictionary.count
    save_table(build_table("random", *known, TableShape(8), 0), tmp_path / "eight.table")
    given = [f"task.data='{data}'", f"model.hash_table='{tmp_path / 'eight.table'}'"]
    with pytest.raises(UserError, match="was built for 8 experts, but --num-experts is 16"):
        check_experiment(compose(CONFIGS, "laptop/hash", given), 1)


def test_what_is_wrong_with_loads():
    """Against the loads counted here: experts without tokens, and a largest load that a better table would not have."""
    generator = np.random.default_rng(1)
    for _ in range(40):
        experts = int(generator.integers(2, 9))
        count_H = generator.integers(1, 50, 200)
        used = int(generator.integers(1, experts + 1))
        expert_HK = generator.integers(0, used, (200, 1))
        loads = [int(count_H[expert_HK[:, 0] == expert].sum()) for expert in range(experts)]
        text = complaint(judge(expert_HK, count_H, experts))
        idle, far = loads.count(0), max(loads) / np.mean(loads)
        assert (f"{idle} of {experts} experts get no token" in (text or "")) == (idle > 0)
        if far > 2.2 or far < 1.8:  # 200 keys can be balanced to well below that
            line = f"the largest load is {far:.2f} times the mean, and a table could have"
            assert (line in (text or "")) == (far > 2.2)
        assert (text is None) == (idle == 0 and far <= 2.2) or 1.8 <= far <= 2.2


def test_a_table_that_sends_all_to_one_expert_is_named(data, tmp_path, capsys, caplog):
    _, task, _, _ = build(data)
    symbols = task.source_dictionary.symbols
    np.save(tmp_path / "one.npy", np.zeros((len(symbols), 1), dtype=np.int64))
    given = ["tables", "import", tmp_path / "one.npy", data / "dict.txt", "--num-experts", "4"]
    assert main([*map(str, given), "--out", str(tmp_path / "one.table")]) == 0
    line = "3 of 4 experts get no token; the largest load is 4.00 times the mean, and a table could have 1.0"
    assert f"note: one.table, on dictionary dict.txt: {line}" in capsys.readouterr().out
    assert main(["tables", "show", str(tmp_path / "one.table"), str(data / "dict.txt"), "--text", str(data)]) == 0
    assert f"note: one.table, on {data}" in capsys.readouterr().out
    with caplog.at_level(logging.WARNING, logger="fairseq_hash.model"):
        build(data, *HASH, "--hash-table", tmp_path / "one.table")
        (said,) = [record.getMessage() for record in caplog.records if "hash-table" in record.getMessage()]
        assert said.startswith(f"--hash-table {tmp_path / 'one.table'}: by the dictionary's counts {line}")
        caplog.clear()
        build(data, *HASH)
        rows = len(symbols)
        record = TableRecord("mine", 4, dictionary_fingerprint(symbols))
        save_table(HashTable(np.arange(rows)[:, None] % 4, record), tmp_path / "even.table")
        build(data, *HASH, "--hash-table", tmp_path / "even.table")
        assert not [record for record in caplog.records if "hash-table" in record.getMessage()]


ABSURD = [
    (
        (*SWITCH, "--num-experts", "100000000"),
        "the weights alone of one rank .* would take .* GB of memory, this machine",
    ),
    ((*HASH, "--num-experts", "100000000"), "100,000,000 experts are more than the 64 entries of the hash table"),
    (("--router", "base", *HASH[2:4], "--num-experts", str(10**30)), "of memory, this machine has"),
    (
        (*HASH, "--hash-feature", "bigram", "--hash-table", "random", "--hash-buckets", str(10**12)),
        "a hash table of 1,000,000,000,000 rows of 1 experts would take 24 TB of memory",
    ),
    ((*HASH, "--multi-hash", str(10**9)), "a hash table of 64 rows of 1,000,000,000 experts would take 1.54 TB"),
    (
        ("--router", "base", *HASH[2:], "--sparse-placement", "insert", "--expert-sublayers", str(10**9)),
        # 4 experts x 10^9 sub-layers x 4 bytes x (norm 2 x 16, linear 16 x 32 + 32, linear 32 x 16 + 16)
        "--expert-sublayers 1000000000, 1 sparse layers. would take 17.7 TB of memory",
    ),
    ((*HASH, "--experts-per-token", str(10**9)), "--experts-per-token 1000000000 is out of range; give 1 to 4"),
]


@pytest.mark.parametrize(("arguments", "message"), ABSURD, ids=[message[:30] for _, message in ABSURD])
def test_absurd_sizes_end_before_anything_is_allocated(data, arguments, message, monkeypatch):
    monkeypatch.setattr("fairseq_hash.core.memory.machine_bytes", lambda: 64e9)
    with pytest.raises(SystemExit, match=message) as ended:
        build(data, *arguments)
    assert "\n" not in str(ended.value)


def test_absurd_tables_are_not_built(data, tmp_path):
    words = ("tables", "build", data / "dict.txt", "--out", tmp_path / "no.table", "--num-experts")
    assert "100,000,000 experts are more than the 64 entries" in refused(*words, 10**8)
    random = (*words, "4", "--builder", "random")
    assert "24 TB of memory" in refused(*random, "--feature", "bigram", "--keys", 10**12)
    assert "1.54 TB of memory" in refused(*random, "--multi-hash", 10**9)
    np.save(tmp_path / "one.npy", np.zeros((64, 1), dtype=np.int64))
    given = ("tables", "import", tmp_path / "one.npy", data / "dict.txt", "--out", tmp_path / "no.table")
    assert "are more than the 64 entries" in refused(*given, "--num-experts", 10**12)
    assert not (tmp_path / "no.table").exists()


def test_memory_of_this_machine():
    assert 1e8 < machine_bytes() < 1e16
    check_fits(machine_bytes(), "a thing", "make it smaller")
    with pytest.raises(UserError, match="a thing would take .* of memory, this machine has .*; make it smaller"):
        check_fits(machine_bytes() + 1, "a thing", "make it smaller")
    sizes = {12: "12 bytes", 1.5e6: "1.5 MB", 2e9: "2 GB", 1.23e14: "123 TB", 5e21: "5,000,000 PB"}
    assert [*map(in_words, sizes)] == [*sizes.values()]
    check_table_size(64, 1, 64)
    check_table_size(64, 2, 128)
    with pytest.raises(UserError, match="129 experts are more than the 128 entries"):
        check_table_size(64, 2, 129)


def test_a_dictionary_that_repeats_a_symbol_ends_training_in_one_line(data, tmp_path):
    """fairseq-preprocess leaves the mark out that lets a later line win; with it, the data train."""
    folder = tmp_path / "repeated"
    shutil.copytree(data, folder)
    text = (data / "dict.txt").read_text()
    (folder / "dict.txt").write_text(text + "word3 5\n")
    done = train(folder, tmp_path / "run", *HASH, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"fairseq_hash: {folder}/dict.txt is no fairseq dictionary: line 61")
    assert "repeats the symbol 'word3'; end that line with #fairseq:overwrite" in last
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (folder / "dict.txt").write_text(text + "word3 5 #fairseq:overwrite\n")
    build(folder, *HASH)
    (folder / "dict.txt").write_text(text + "nothing\n")
    with pytest.raises(SystemExit, match="line 61 is not a symbol and its count"):
        build(folder, *HASH)
