"""The command `fairseq-hash`: its errors are one line, exit status 1 or 2; the verb `report`."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from called import call, refused
from made_runs import FILES

from fairseq_hash.cli import VERBS, main
from fairseq_hash.provenance import __version__


def test_report_writes_and_says_where(made, tmp_path):
    note = tmp_path / "note.txt"
    note.write_text("What these runs can show.")
    runs = [made / "dense5", made / "hash5"]
    status, out, err = call("report", *runs, "--out", tmp_path / "out", "--title", "A title", "--note", note)
    assert (status, err) == (0, "compared 2 runs of 2 models\n")
    assert sorted(out.splitlines()) == [f"wrote {tmp_path / 'out' / name}" for name in FILES]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["title"] == "A title"
    assert "What these runs can show." in (tmp_path / "out" / "results.md").read_text()


def test_a_refused_report_writes_nothing(tmp_path):
    assert "is not a folder; " in refused("report", tmp_path / "none", "--out", tmp_path / "out")
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


HEAVY = ("torch", "fairseq", "fairscale", "transformers", "numpy", "pandas", "matplotlib", "sklearn", "rich", "hydra")


CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("calls", "allowed"),
    [
        ([["--version"], ["--help"], ["nonsense"], ["plan", "--list", "--config-dir", str(CONFIGS)]], ()),
        ([[verb, "--help"] for verb in VERBS], ("numpy", "rich")),
        ([["tables", "build", "DICT", "--num-experts", "2", "--out", "OUT"]], ("torch", "numpy", "rich")),
    ],
)
def test_what_a_verb_imports(calls, allowed, dictionary, tmp_path):
    """What a verb does not need is not imported, so that it starts at once."""
    paths = {"DICT": str(dictionary), "OUT": str(tmp_path / "out")}
    given = [[paths.get(word, word) for word in arguments] for arguments in calls]
    program = f"""
import contextlib, sys
from fairseq_hash.cli import main
for arguments in {given}:
    with contextlib.suppress(SystemExit):
        main(arguments)
    print("loaded", *(name for name in {HEAVY} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("loaded")]
    assert len(loaded) == len(calls)
    for arguments, names in zip(calls, loaded, strict=True):
        assert set(names) <= set(allowed), arguments


def test_each_verb_has_its_module():
    """The table of verbs is all that the first help knows."""
    status, out, _ = call("--help")
    assert status == 0
    for verb in VERBS:
        assert re.search(rf"^    {verb}\b", out, re.MULTILINE)
        assert call(verb, "--help")[1].startswith(f"usage: fairseq-hash {verb}")


def test_interrupted_during_imports(monkeypatch):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("fairseq_hash.cli.import_module", interrupt)
    assert refused("tables", "show", "t", "d", status=130) == "fairseq-hash: interrupted"


@pytest.mark.parametrize("end", ["at the first line", "at the end"])
def test_nobody_reads_on(end, tmp_path):
    """`fairseq-hash plan --list | head -1`, with more output than a buffer of 8 KiB holds, or less."""
    number = 1000 if end == "at the first line" else 3
    (tmp_path / "of_mine").mkdir()
    for name in range(number):
        (tmp_path / "of_mine" / f"experiment{name}.yaml").touch()
    program = "import sys; from fairseq_hash.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "plan", "--list"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*command, "--config-dir", tmp_path], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


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
