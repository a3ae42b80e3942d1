"""benchmarks/train.py on a tiny model: every candidate trains and decodes, and both files have the same numbers."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "train.py"
TINY = "--experts 4 --layers 2 --sparse-layers 1 --width 16 --hidden 32 --tokens 64 --updates 3 --prefix 2 --steps 4"


def run(*arguments):
    """Run the program; return the finished process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(PROGRAM), *TINY.split(), "--threads", "1", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture(scope="module")
def measured(data, tmp_path_factory):
    """What a run wrote: the content of the JSON file, the Markdown, and what was printed."""
    folder = tmp_path_factory.mktemp("measured")
    done = run("--data", data, "--batch", 1, 3, "--json", folder / "train.json", "--out", folder / "train.md")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "train.json").read_text()), (folder / "train.md").read_text(), done.stdout


def test_every_candidate_trains(measured):
    content, _, _ = measured
    assert content["benchmark"] == "train" and content["settings"]["width"] == 16 and content["provenance"]["torch"]
    trained = {row["candidate"]: row for row in content["rows"] if "updates_per_second" in row}
    assert list(trained) == ["dense", "hash", "switch", "base"]
    for row in trained.values():
        assert (row["experts"], row["tokens"]) == (4, 64)
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
        assert row["updates_per_second"] == pytest.approx(1 / row["seconds"])
        assert row["tokens_per_second"] == pytest.approx(64 / row["seconds"])
        # None where the system cannot tell.
        assert row["peak_bytes"] is None or row["peak_bytes"] >= 12 * row["parameters"]
    assert trained["dense"]["ratio"] == 1
    feed_forward = 16 * 32 + 32 + 32 * 16 + 16
    assert trained["hash"]["parameters"] == trained["dense"]["parameters"] + 3 * feed_forward
    assert trained["hash"]["active"] == trained["dense"]["active"] == trained["dense"]["parameters"]
    assert 0 < trained["hash"]["over_base_low"] <= trained["hash"]["over_base"] <= trained["hash"]["over_base_high"]


def test_every_candidate_decodes(measured):
    content, _, _ = measured
    decoded = [row for row in content["rows"] if "updates_per_second" not in row]
    names = [f"{name} decoding" for name in ("dense", "hash", "switch", "base")]
    assert [(row["candidate"], row["tokens"]) for row in decoded] == [(name, size) for size in (1, 3) for name in names]
    assert all(0 < row["low"] <= row["seconds"] <= row["high"] for row in decoded)


def test_the_tables_show_the_same(measured):
    content, markdown, printed = measured
    assert printed == markdown
    for row in content["rows"]:
        start = f"| 4 | {row['candidate']} | " if "updates_per_second" in row else f"| 4 | {row['tokens']} | "
        shown = [line for line in markdown.splitlines() if line.startswith(start) and row["candidate"] in line]
        assert len(shown) == 1 and f" {row['ratio']:.2f} |" in shown[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--updates", "0"), "--updates 0 is out of range; give a number of 1 or more"),
        (("--batch", "1", "0"), "--batch 0 is out of range"),
        (("--prefix", "60", "--steps", "5"), "--prefix and --steps are 65 tokens; give 64 at most"),
        (("--json", "no folder/a.json"), "the folder no folder does not exist; make it first"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *TINY.split(), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1
