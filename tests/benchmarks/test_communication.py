"""benchmarks/communication.py on two processes: tables, JSON, and chunks that give what the whole exchange gives."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "communication.py"
TINY = ("--processes", "2", "--tokens", "32", "--width", "8", "--hidden", "16", "--rounds", "2")
PARTS = ["route", "gather", "exchange", "experts", "combine"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What a run with 2 and with 4 experts a rank wrote: the content of the JSON file, and the Markdown."""
    folder = tmp_path_factory.mktemp("measured")
    files = ["--json", str(folder / "a.json"), "--out", str(folder / "a.md")]
    command = [sys.executable, str(PROGRAM), *TINY, "--experts", "4", "8", *files]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    # The program itself compares the output of ours, top-1 and the chunks, and ends where they differ.
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == (folder / "a.md").read_text()
    return json.loads((folder / "a.json").read_text()), done.stdout


def test_rows_of_the_json_file(measured):
    content, _ = measured
    assert content["benchmark"] == "communication" and content["settings"]["processes"] == 2
    layers = ["dense", "ours", "top-1", "top-2", "dense, forward", "whole, forward", "2 chunks, forward"]
    # A rank with 2 experts has no 4 chunks.
    expected = [(4, name) for name in layers] + [(8, name) for name in (*layers, "4 chunks, forward")]
    assert [(row["experts"], row["candidate"]) for row in content["rows"]] == expected
    for row in content["rows"]:
        assert row["tokens"] == 32 and row["peak_bytes"] is None and row["ratio"] > 0
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
        if row["candidate"].startswith("dense"):
            assert row["ratio"] == 1
        if row["candidate"] == "ours":
            assert list(row["parts"]) == PARTS and all(seconds > 0 for seconds in row["parts"].values())
            assert 0 < row["split_sizes_seconds"] < row["parts"]["exchange"] and row["rows_seconds"] > 0
        else:
            assert "parts" not in row


def test_tables(measured):
    """One row a number of experts in each of the three tables; the ratios are those of the JSON file."""
    content, text = measured
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if re.match(r"\| \d", line)]
    assert [row[0] for row in rows] == ["4", "8"] * 3
    for row, experts in zip(rows[:2], (4, 8), strict=True):
        ours = next(r for r in content["rows"] if r["candidate"] == "ours" and r["experts"] == experts)
        assert row[3].startswith(f"{ours['ratio']:.2f} (") and row[6].startswith(f"{1000 * ours['seconds']:.1f} (")
        # Forward and backward, the rows of both ranks that leave: at most all of them, four times.
        assert 0 < ours["megabytes"] <= 4 * 2 * 32 * 8 * 4 / 1e6
    assert rows[4][3] == "" and rows[5][3] != ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--experts", "3"), "--experts 3 cannot be shared by equal capacity"),
        (("--chunks", "1"), "--chunks 1 is out of range; give a number of 2 or more"),
        (("--json", "no folder/a.json"), "the folder no folder does not exist; make it first"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *TINY, "--experts", "4", *arguments])
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1
