"""`python -m data_prep`: Ctrl-C, places that cannot be filled, folders that cannot serve as --like."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from forked import start_python
from prepared import SPLITS, arguments, write_text

from data_prep import prepare as preparation
from data_prep.cli import main

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("in_one_process")


def processes_of(group):
    """The processes of a group that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of_group) == group and state != "Z":
            found.append(path)
    return found


def test_ctrl_c_ends_everything_and_the_next_call_goes_on(tmp_path):
    """Ctrl-C goes to every process of a terminal: while the model is trained, and while data are written."""
    files = write_text(tmp_path / "text", lines=20_000)
    out, work = tmp_path / "data", tmp_path / "data.partial"
    for stage in ("sample.txt", "train.bin"):
        words = ["-m", "data_prep", *arguments(files, out, "--vocab-size", "300")]
        said = tmp_path / f"said before {stage}"
        child = start_python(words, tmp_path / "out", said, ROOT)
        while not (work / stage).exists() and child.exitcode is None:
            time.sleep(0.005)
        os.killpg(child.pid, signal.SIGINT)
        child.join(100)
        assert said.read_text() == "data_prep: interrupted; the same command continues from the last finished step\n"
        assert child.exitcode == 130 and not out.exists()
        for _ in range(400):
            if not processes_of(child.pid):
                break
            time.sleep(0.05)
        assert not processes_of(child.pid)
    assert "tokens" in preparation.read_json(work / "state.json")
    assert main(arguments(files, out, "--vocab-size", "300")) == 0


def test_a_link_to_an_empty_folder_gets_the_data(tmp_path):
    """The link stays, and what it leads to is filled; a second call finds it done."""
    files = write_text(tmp_path / "text", lines=30)
    (tmp_path / "disk" / "data").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "data")
    assert main(arguments(files, tmp_path / "link", "--words")) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "data" / "train.idx").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link", "text"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["data"]
    assert not (tmp_path / "link" / "state.json").exists()
    made = (tmp_path / "link" / "provenance.json").stat().st_mtime_ns
    assert main(arguments(files, tmp_path / "link", "--words")) == 0
    assert (tmp_path / "link" / "provenance.json").stat().st_mtime_ns == made


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (".", "--out . is where you are, and cannot be replaced; give a folder in it: --out data"),
        ("../empty", "--out ../empty is where you are, and cannot be replaced"),
        ("dangling", "--out dangling is a link to a folder that does not exist"),
        ("loop", "--out loop is a link to a folder that does not exist"),
        ("a file", "--out a file is a file; give a folder that does not exist yet"),
        ("/proc/sys", "/proc/sys holds something else"),
    ],
)
def test_a_place_that_cannot_be_filled_is_refused_before_work(tmp_path, monkeypatch, capsys, place, said):
    files = write_text(tmp_path / "text", lines=30)
    here = tmp_path / "empty"
    here.mkdir()
    monkeypatch.chdir(here)
    if place in ("dangling", "loop", "a file"):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "dangling").symlink_to("nowhere")
        (tmp_path / "loop").symlink_to("loop")
        (tmp_path / "a file").touch()
    assert main(arguments(files, place, "--words")) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.partial*"))


def test_a_move_that_fails_at_the_end_is_gone_on_with(tmp_path, monkeypatch, capsys):
    """Nothing is done twice where the finished folder cannot get its name."""
    files = write_text(tmp_path / "text", lines=30)
    out = tmp_path / "data"

    def fail(source, target):
        raise PermissionError(13, "Permission denied", str(target))

    with monkeypatch.context() as patched:
        real = os.replace
        patched.setattr(preparation.os, "replace", lambda a, b: fail(a, b) if Path(b) == out else real(a, b))
        assert main(arguments(files, out, "--words")) == 1
    assert "Permission denied" in capsys.readouterr().err and not out.exists()
    made = (tmp_path / "data.partial" / "train.idx").stat().st_mtime_ns
    assert main(arguments(files, out, "--words")) == 0
    assert (out / "train.idx").stat().st_mtime_ns == made
    record = json.loads((out / "provenance.json").read_text())
    assert set(record["sha256"]) == {"dict.txt", *(f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx"))}


def test_a_folder_that_cannot_serve_as_like_is_refused_before_work(tmp_path, capsys):
    files = write_text(tmp_path / "text", lines=30)
    words = tmp_path / "words"
    assert main(arguments(files, words, "--words")) == 0
    (words / "sentencepiece.model").touch()
    assert main(arguments(files, tmp_path / "x", "--like", str(words))) == 1
    assert f"--like {words} was made of words; give --words, too" in capsys.readouterr().err
    dictionary = words / "dict.txt"
    first = dictionary.read_text().split()[0]
    dictionary.write_text(dictionary.read_text() + f"{first} 3 #fairseq:overwrite\n")
    assert main(arguments(files, tmp_path / "x", "--words", "--like", str(words))) == 1
    error = capsys.readouterr().err
    assert f"dict.txt has {first!r} twice (#fairseq:overwrite)" in error and error.count("\n") == 1
    dictionary.write_text("no dictionary\n")
    assert main(arguments(files, tmp_path / "x", "--words", "--like", str(words))) == 1
    assert "is no fairseq dictionary: line 1 is not a symbol and its count" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))
