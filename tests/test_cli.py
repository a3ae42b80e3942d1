"""The command `fairseq-hash`: what it prints against plain Python, and its errors: one line, exit status 1 or 2."""

import contextlib
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
from importlib import metadata

import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from made_runs import FILES

from fairseq_hash.cli import main
from fairseq_hash.provenance import __version__

WORDS = ("the", "of", "and", "hash", "table")


def call(*arguments):
    """Return exit status, standard output and standard error of `fairseq-hash` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def refused(*arguments, status=1):
    """Return the one line that a call ends with."""
    code, out, err = call(*arguments)
    assert (code, out) == (status, "") and err.endswith("\n") and err.count("\n") == 1, err
    return err[:-1]


def shown(out):
    """Return the rows of a table that was printed, by their names."""
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in out.splitlines() if "│" in line]
    return dict(cells)


def write_dictionary(path, counts):
    path.write_text("".join(f"{word} {count}\n" for word, count in zip(WORDS, counts, strict=True)))
    return path


@pytest.fixture
def dictionary(tmp_path):
    return write_dictionary(tmp_path / "dict.txt", (50, 30, 20, 10, 7))


def test_a_table_by_hand(dictionary, tmp_path):
    """Counts 50, 30, 20, 10, 7 and 1 for each of fairseq's four symbols, on two experts, by descending count:
    50 | 30 + 20, then 10 | and 7, and the ones go where less is: 50 + 10 + 1 = 61 and 30 + 20 + 7 + 3 = 60."""
    status, out, err = call("tables", "build", dictionary, "--num-experts", 2, "--out", tmp_path / "a.table")
    assert (status, err) == (0, "") and out.startswith(f"wrote {tmp_path / 'a.table'}\n")
    assert shown(out) == {
        "builder": "balanced",
        "experts": "2",
        "vocabulary": "9",
        "tokens an expert serves": "3 to 6",
        "largest load / mean": f"{61 / 60.5:.4f}",
        "smallest load / mean": f"{60 / 60.5:.4f}",
        "coefficient of variation": f"{0.5 / 60.5:.4f}",
    }
    status, again, err = call("tables", "show", tmp_path / "a.table", dictionary)
    assert (status, err) == (0, "") and shown(again) == shown(out) and not again.startswith("wrote")


@given(
    st.lists(st.integers(0, 10**9), min_size=5, max_size=5),
    st.integers(1, 12),
    st.sampled_from(["balanced", "random"]),
    st.integers(0, 2**31),
)
def test_any_table_by_plain_python(tmp_path_factory, counts, num_experts, builder, seed):
    """Built with counts of 2 and more, then judged on others: its load is summed here expert by expert."""
    folder = tmp_path_factory.getbasetemp()
    built_on = [2 + count % 7 for count in counts]
    options = ("--builder", builder, "--num-experts", num_experts, "--seed", seed, "--out", folder / "any.table")
    assert call("tables", "build", write_dictionary(folder / "built.txt", built_on), *options)[0] == 0
    status, out, err = call("tables", "show", folder / "any.table", write_dictionary(folder / "other.txt", counts))
    assert (status, err) == (0, "")
    if builder == "balanced":
        experts = reference.balanced_hash([1, 1, 1, 1, *built_on], num_experts)
    else:
        keys = [token + (seed << 32) for token in range(9)]
        experts = [reference.splitmix64(reference.splitmix64(key)) % num_experts for key in keys]
    load, tokens = [0] * num_experts, [0] * num_experts
    for expert, count in zip(experts, [1, 1, 1, 1, *counts], strict=True):
        load[expert] += count
        tokens[expert] += 1
    mean = statistics.fmean(load)
    rows = shown(out)
    assert rows["builder"] == ("balanced" if builder == "balanced" else f"random, seed {seed}")
    assert rows["tokens an expert serves"] == f"{min(tokens)} to {max(tokens)}"
    # Four decimals are printed; the last may be rounded the other way.
    for name, value in (
        ("largest load / mean", max(load) / mean),
        ("smallest load / mean", min(load) / mean),
        ("coefficient of variation", statistics.pstdev(load) / mean),
    ):
        assert float(rows[name]) == pytest.approx(value, abs=1.01e-4 / 2)


def test_tables_refusals(dictionary, tmp_path):
    """Each names the value and the remedy, and writes nothing."""
    build = ("tables", "build", dictionary, "--out", tmp_path / "t")
    for number in (0, -3):
        assert refused(*build, "--num-experts", number) == (
            f"fairseq-hash: --num-experts {number} is out of range; give a number of 1 or more"
        )
    assert "--seed -1 is out of range" in refused(*build, "--num-experts", 2, "--seed", -1)
    nowhere = tmp_path / "none" / "t"
    assert f"the folder {nowhere.parent} does not exist" in refused(*build, "--num-experts", 2, "--out", nowhere)
    (tmp_path / "folder").mkdir()
    message = refused(*build, "--num-experts", 2, "--out", tmp_path / "folder")
    assert message.startswith(f"fairseq-hash: cannot write --out {tmp_path / 'folder'} (")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dict.txt", "folder"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, " does not exist; give the dict.txt that fairseq-preprocess wrote"),
        (b"the 5\nthe 4\n", " is no fairseq dictionary: Duplicate word"),
        (b"the\n", " is no fairseq dictionary: Incorrect dictionary format"),
        (b"caf\xe9 5\n", " is no fairseq dictionary: Incorrect encoding"),
        (b"", "the dictionary has no token counts"),
        (b"the 1\nof 1\n", "the dictionary has no token counts"),
    ],
)
def test_a_dictionary_that_is_none(tmp_path, content, message):
    path = tmp_path / "dict.txt"
    if content is not None:
        path.write_bytes(content)
    assert message in refused("tables", "build", path, "--num-experts", 2, "--out", tmp_path / "t")


def test_tables_show_refusals(dictionary, tmp_path):
    """No file, another file, another dictionary: other words, or the same in another order."""
    file = tmp_path / "t"
    assert call("tables", "build", dictionary, "--num-experts", 2, "--out", file)[0] == 0
    assert str(tmp_path / "none") in refused("tables", "show", tmp_path / "none", dictionary)
    assert "does not exist" in refused("tables", "show", file, tmp_path / "none")
    assert "is damaged or no table file" in refused("tables", "show", dictionary, dictionary)
    other = tmp_path / "other.txt"
    for words in (("the", "of", "and", "hash", "other"), reversed(WORDS)):
        other.write_text("".join(f"{word} 5\n" for word in words))
        message = refused("tables", "show", file, other)
        assert message == f"fairseq-hash: {file} was built for another dictionary than {other}"


def test_report_writes_and_says_where(made, tmp_path):
    note = tmp_path / "note.txt"
    note.write_text("What these runs can show.")
    runs = [made / "dense5", made / "hash5"]
    status, out, err = call("report", *runs, "--out", tmp_path / "out", "--title", "A title", "--note", note)
    assert (status, err) == (0, "")
    assert sorted(out.splitlines()) == [f"wrote {tmp_path / 'out' / name}" for name in FILES]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["title"] == "A title"
    assert "What these runs can show." in (tmp_path / "out" / "results.md").read_text()


def test_report_refusals(made, tmp_path):
    """One given twice, no folder, no log: one line, nothing is written."""
    run = made / "dense5"
    assert "was given twice; name each run once" in refused("report", run, run, "--out", tmp_path / "out")
    assert "is not a folder; " in refused("report", tmp_path / "none", "--out", tmp_path / "out")
    assert "holds no log; " in refused("report", tmp_path, "--out", tmp_path / "out")
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("*.pt"))
    text = (run / "train.log").read_text()
    (tmp_path / "run" / "train.log").write_text(text[: text.index("done training")])
    message = refused("report", tmp_path / "run", "--out", tmp_path / "out")
    assert message == (
        f"fairseq-hash: no run can be reported; the first of 1, {tmp_path / 'run'}: training stopped at update 8 of 8"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "fairseq-hash: the following arguments are required: VERB (see fairseq-hash --help)"),
        (("tables",), "fairseq-hash tables: the following arguments are required: VERB"),
        (("tables", "build", "dict.txt"), "fairseq-hash tables build: the following arguments are required: "),
        (("tables", "build", "d", "--num-experts", "two", "--out", "t"), "invalid int value: 'two'"),
        (("tables", "build", "d", "--num-experts", "2", "--out", "t", "--builder", "x"), "invalid choice: 'x'"),
        (("report", "--out", "out"), "fairseq-hash report: the following arguments are required: RUN"),
        (("report", "run"), "fairseq-hash report: the following arguments are required: --out"),
        (("nonsense",), "invalid choice: 'nonsense'"),
    ],
)
def test_wrong_calls(arguments, message):
    """Exit status 2, as usual, in one line that says where to read more."""
    line = refused(*arguments, status=2)
    assert message in line and line.endswith("--help)")


def test_help_and_version():
    assert call("--version") == (0, f"fairseq-hash {__version__}\n", "")
    for verb in ((), ("tables",), ("tables", "build"), ("tables", "show"), ("report",)):
        status, out, err = call(*verb, "--help")
        assert (status, err) == (0, "") and re.match("usage: fairseq-hash", out)


def test_interrupted(dictionary, monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("fairseq_hash.cli.tables.run_show", interrupt)
    assert refused("tables", "show", dictionary, dictionary, status=130) == "fairseq-hash: interrupted"


def test_the_installed_command():
    """It is `main`; to the shell go its exit status and its one line, with no library's words above it."""
    (command,) = metadata.entry_points(group="console_scripts", name="fairseq-hash")
    assert command.load() is main
    program = "import sys; from fairseq_hash.cli import main; sys.exit(main())"
    arguments = [sys.executable, "-c", program, "tables", "show", "none", "none"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("fairseq-hash: ") and done.stderr.count("\n") == 1
