"""`benchmarks/layer.py` on tiny layers: the form of its file, and its words on bad input."""

import argparse
import dataclasses
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from forked import run_python

from fairseq_hash.reporting.benchmarks_files import load_benchmarks

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "layer.py"
TINY = ("--width", "16", "--hidden", "32", "--tokens", "64", "--experts", "4", "--rounds", "2", "--threads", "1")
TIMES = {"seconds", "low", "high"}


def assert_times(time):
    assert 0 < time["low"] <= time["seconds"] <= time["high"] < math.inf


def run_program(*words):
    run = run_python([PROGRAM, *TINY, *words], OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stderr
    return run


def test_measures_every_layer(tmp_path):
    files = tmp_path / "layer.json", tmp_path / "layer.md"
    run = run_program("--json", files[0], "--out", files[1])
    record = json.loads(files[0].read_text())
    assert set(record) == {"benchmark", "provenance", "settings", "left_out", "rows"}
    assert record["benchmark"] == "layer" and record["settings"]["dtype"] == "float32"
    rows = {row["candidate"]: row for row in record["rows"]}
    peers = {"fairscale"} | ({"transformers"} if record["settings"]["transformers"] else set())
    assert set(rows) == {"dense", "hash", "switch", "base", "mask-and-loop"} | peers
    for row in rows.values():
        assert (row["experts"], row["tokens"]) == (4, 64)
        assert_times(row)
        assert 0 < row["ratio"] < math.inf
        assert row["weight_bytes"] == row["gradient_bytes"] > 0
        assert row["peak_bytes"] is None or row["peak_bytes"] >= 0
    assert rows["dense"]["ratio"] == 1
    assert rows["hash"]["weight_bytes"] == 4 * rows["dense"]["weight_bytes"]
    assert_split(rows["hash"])
    assert all("parts" not in row for name, row in rows.items() if name != "hash")
    assert len(load_benchmarks([files[0]])[0].rows) == len(rows)  # as the report reads it
    assert files[1].read_text() == run.stdout
    assert "| 4 | 64 | hash |" in run.stdout


def test_measures_chosen_layers(tmp_path):
    run_program("--candidates", "switch", "--json", tmp_path / "layer.json")
    record = json.loads((tmp_path / "layer.json").read_text())
    assert [row["candidate"] for row in record["rows"]] == ["dense", "hash", "switch"]
    assert not record["left_out"]


def assert_split(row):
    parts, beside = row["parts"], row["beside"]
    assert set(parts) == {"route", "gather", "exchange", "experts", "combine", "rest"}
    assert parts["exchange"]["seconds"] == 0  # one process
    for time in [parts[name] for name in ("route", "gather", "experts", "combine")] + list(beside.values()):
        assert set(time) == TIMES | {"share"}
        assert_times(time)
        assert time["share"] > 0
    assert set(beside) == {"matmuls", "assignment"}
    figures = row["figures"]
    assert figures["outside_experts"] == pytest.approx(1 - parts["experts"]["share"])
    assert figures["outside_matmuls"] == pytest.approx(1 - beside["matmuls"]["share"])
    names = [f"{name}_flops_per_second" for name in ("layer", "matmuls", "rate")]
    assert all(0 < figures[name] < math.inf for name in ("assignment_over_route", *names))


@pytest.fixture
def programs(monkeypatch):
    monkeypatch.syspath_prepend(PROGRAM.parent)


def test_measures_ways_and_goes_on_without_what_cannot_run(programs, monkeypatch, tmp_path):
    import layer_case

    def refuse(*_):
        raise torch.OutOfMemoryError("out of\nmemory")

    monkeypatch.setattr(layer_case.MaskAndLoop, "forward", refuse)
    monkeypatch.setitem(layer_case.by_ways.WAYS, "grouped", refuse)
    words = ("--candidates", "mask-and-loop", "base", "--ways", "padded", "grouped", "--json", tmp_path / "layer.json")
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *TINY, *map(str, words)])
    runpy.run_path(str(PROGRAM), run_name="__main__")
    record = json.loads((tmp_path / "layer.json").read_text())
    rows = {row["candidate"]: row for row in record["rows"]}
    assert list(rows) == ["dense", "hash", "hash (padded)", "base"]
    assert rows["hash"]["way"] == "loop" and rows["hash"]["beside"]["assignment"]
    assert rows["hash (padded)"]["weight_bytes"] == rows["hash"]["weight_bytes"]
    ends = "is left out with 4 experts, 64 tokens: OutOfMemoryError: out of memory"
    assert record["left_out"] == [f"hash (grouped) {ends}", f"mask-and-loop {ends}"]
    assert record["settings"]["ways"] == ["padded", "grouped"]
    assert len(load_benchmarks([tmp_path / "layer.json"])[0].rows) == len(rows)


def test_a_size_that_cannot_be_measured_is_left_out(programs, monkeypatch, capsys, tmp_path):
    import layer_case

    right = layer_case.draw_experts

    def draw(num_experts, *others):
        if num_experts == 8:
            raise torch.OutOfMemoryError("out of memory")
        return right(num_experts, *others)

    monkeypatch.setattr(layer_case, "draw_experts", draw)
    words = ("--experts", "8", "4", "--candidates", "dense", "--json", tmp_path / "layer.json")
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *TINY, *map(str, words)])
    runpy.run_path(str(PROGRAM), run_name="__main__")
    record = json.loads((tmp_path / "layer.json").read_text())
    assert {row["experts"] for row in record["rows"]} == {4}
    assert record["left_out"] == ["8 experts, 64 tokens are left out: OutOfMemoryError: out of memory"]
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *TINY, "--experts", "8"])
    with pytest.raises(SystemExit, match="nothing could be measured: 8 experts"):
        runpy.run_path(str(PROGRAM), run_name="__main__")


def arguments(width, hidden):
    return argparse.Namespace(width=width, hidden=hidden, forward_only=False, seed=0, device="cpu", dtype="float32")


def test_ends_where_layers_disagree(programs):
    import layer_case

    case = layer_case.Case(4, 64, arguments(width=16, hidden=32))
    layers, left_out = case.candidates(["hash", "mask-and-loop"], ["loop", "padded"])
    assert not left_out and not case.check(layers)
    right = layers["hash (padded)"]
    layers["hash (padded)"] = dataclasses.replace(right, forward=lambda: 1.001 * right.forward())
    assert case.check(layers) == [
        "hash (padded) is left out with 4 experts, 64 tokens: ours and mask-and-loop differ by 1e-03; rounding is 1e-05"
    ]
    assert list(layers) == ["hash", "hash (loop)", "mask-and-loop"]
    other = layers["mask-and-loop"]
    layers["mask-and-loop"] = dataclasses.replace(other, forward=lambda: 1.001 * other.forward())
    with pytest.raises(SystemExit, match="4 experts, 64 tokens: ours and mask-and-loop differ by 1e-03"):
        case.check(layers)


def test_peak_memory_is_that_of_the_call(programs):
    from rounds import Call, peak_bytes

    def grow():
        return torch.ones(2**23) + torch.ones(2**22).repeat(2)  # at most three of 32 MiB at once

    peak = peak_bytes(Call(grow), torch.device("cpu"))
    if peak is None:
        pytest.skip("this system cannot reset its peak of resident memory")
    assert 96 * 2**20 * 0.95 < peak < 96 * 2**20 * 1.3


def test_peak_memory_counts_gradients_whose_memory_is_kept(programs):
    import layer_case
    from rounds import peak_bytes

    layer = layer_case.Case(4, 64, arguments(width=512, hidden=1024)).sparse(None)
    for _ in range(2):
        peak = peak_bytes(layer, torch.device("cpu"))
        if peak is None:
            pytest.skip("this system cannot reset its peak of resident memory")
        assert peak > 0.95 * sum(leaf.nbytes for leaf in layer.leaves)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rounds 0", "--rounds 0 is out of range; give a number of 1 or more"),
        ("--experts 4 0", "--experts 0 is out of range; give numbers from 1 to 8000"),
        ("--tokens -1", "--tokens -1 is out of range; give numbers of 1 or more"),
        ("--dtype float64", "invalid choice: 'float64'"),
        ("--json {}/none/a.json", "/none does not exist; make it first"),
    ],
)
def test_says_what_is_wrong(words, message, programs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *words.format(tmp_path).split()])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(PROGRAM))["parse"]()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
