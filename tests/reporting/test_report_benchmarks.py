"""`fairseq-hash report --benchmarks`: the numbers of made files in all that is written, and what is refused."""

import csv
import json

import pytest
from called import call
from matplotlib.colors import to_hex

from fairseq_hash.core.errors import UserError
from fairseq_hash.reporting.benchmarks import write_benchmarks
from fairseq_hash.reporting.benchmarks_files import load_benchmarks
from fairseq_hash.reporting.benchmarks_plots import split_of_time, time_by_experts, time_by_tokens
from fairseq_hash.reporting.drawing import MOST_PANELS, draw
from fairseq_hash.reporting.theme import LIGHT

PARTS = {"route": 0.001, "gather": 0.002, "exchange": 0.0, "experts": 0.006, "combine": 0.001}


def row(candidate, experts, tokens, ratio, **further):
    return {
        **{"experts": experts, "tokens": tokens, "candidate": candidate, "seconds": 0.01 * ratio},
        **{"low": 0.009 * ratio, "high": 0.012 * ratio, "ratio": ratio, "peak_bytes": None, **further},
    }


def layer_rows():
    """Two numbers of experts, two of tokens."""
    rows = []
    for experts in (8, 64):
        for tokens in (256, 4096):
            rows.append(row("dense", experts, tokens, 1.0, peak_bytes=2_500_000))
            rows.append(row("hash", experts, tokens, 1 + experts / tokens, parts=PARTS))
    return rows


def train_rows():
    """One set-up; hash with its parts as `layer.py` gives them, one of them below zero."""
    parts = {"experts": {"seconds": 0.03, "low": 0.02}, "combine": {"seconds": 0.02}, "rest": {"seconds": -0.01}}
    faster = {"updates_per_second": 12.5, "over_base": 1.125, "parts": parts}
    speed = {"updates_per_second": 25, "model_flops_per_second": 2e14, "utilisation": 0.25}
    sizes = {"held_bytes": 2_000_000, "state_bytes_planned": 1_500_000}
    return [
        *(row("dense", 16, 512, 1.0, **speed, **sizes), row("hash", 16, 512, 1.5, **faster)),
        *(row("dense decoding", 16, 1, 1.0), row("hash decoding", 16, 1, 1.75)),
    ]


@pytest.fixture
def write(tmp_path):
    """A function that writes a file of a benchmark and returns its path."""

    def write(name, kind, rows, **further):
        path = tmp_path / name
        provenance = {"torch": "2.1", "gpus": [], "date": "2026-01-01"}
        settings = {"width": 16, "batch": [1, 2]}
        content = {"benchmark": kind, "provenance": provenance, "settings": settings, "rows": rows}
        path.write_text(json.dumps({**content, **further}))
        return path

    return write


@pytest.fixture
def files(write):
    layer = write("a.json", "layer", layer_rows(), left_out=["a peer: <too> large"])
    return [layer, write("b.json", "train", train_rows())]


def test_everything_is_written(files, unrendered, tmp_path):
    """Tables in Markdown, and a CSV that has every number."""
    note = tmp_path / "note.txt"
    note.write_text("On a laptop.")
    out = tmp_path / "out"
    status, said, err = call("report", "--benchmarks", *files, "--out", out, "--title", "Speed & more", "--note", note)
    written = ["results.csv", "results.md", "split_of_time.png", "time_by_experts.png", "time_by_tokens.png"]
    assert (status, err) == (0, "") and sorted(path.name for path in out.iterdir()) == written
    assert sorted(said.split()) == sorted(["wrote"] * len(written) + [str(out / name) for name in written])
    text = (out / "results.md").read_text()
    assert text.startswith("# Speed & more\n") and "On a laptop." in text and "- a peer: <too> large" in text
    assert "width 16; batch 1, 2" in text
    for line in (
        "| dense | 8 | 256 | 10.00 (9.00 to 12.00) | 1.00 | 2.5 MB |",
        "| hash | 64 | 256 | 12.50 (11.25 to 15.00) | 1.25 | – |",
        "| hash | 8 | 256 | 1.00 (10%) | 2.00 (20%) | 0.00 (0%) | 6.00 (60%) | 1.00 (10%) | 10.00 |",
        "| dense | 16 | 512 | 10.00 (9.00 to 12.00) | 1.00 | 2.0 MB | 1.5 MB | 25 | 200 | 25% | – |",
        "| hash | 16 | 512 | 15.00 (13.50 to 18.00) | 1.50 | – | – | 12.5 | – | – | 1.12 |",
        "| hash decoding | 16 | 1 | 17.50 (15.75 to 21.00) | 1.75 | – | – | – | – | – | – |",
        "| hash | 16 | 512 | 30.00 (75%) | 20.00 (50%) | -10.00 (-25%) | 40.00 |",
        "| torch | 2.1 | 2.1 |",
    ):
        assert line in text.splitlines(), line
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert float(rows[1]["seconds"]) == 0.01 * (1 + 8 / 256) and float(rows[1]["part_experts"]) == 0.006
    assert rows[9]["over_base"] == "1.125" and rows[9]["benchmark"] == "train"


def test_time_by_experts_and_by_tokens(files, drawn):
    """Of a file with one number of experts points, decoding apart; no panel by tokens where they do not vary."""
    benchmarks = load_benchmarks(files)
    panels = {axes.get_title("left"): axes for axes in draw(time_by_experts(benchmarks), LIGHT).axes}
    trainings = ["Whole trainings: 512 tokens", "Whole trainings: 1 sentence, decoding"]
    assert list(panels) == ["One layer: 256 tokens", "One layer: 4,096 tokens", *trainings]
    dense, hash_line = panels["One layer: 256 tokens"].lines
    assert [*dense.get_xdata()] == [*hash_line.get_xdata()] == [8, 64] and [*dense.get_ydata()] == [1, 1]
    assert [*hash_line.get_ydata()] == [1 + 8 / 256, 1.25] and to_hex(dense.get_color()) == LIGHT.neutral
    assert {text.get_text() for text in panels["One layer: 256 tokens"].texts} == {"dense 1.00", "hash 1.25"}
    _, decoding = panels["Whole trainings: 1 sentence, decoding"].lines
    assert [*decoding.get_ydata()] == [1.75] and decoding.get_color() == hash_line.get_color()
    panels = {axes.get_title("left"): axes for axes in draw(time_by_tokens(benchmarks), LIGHT).axes}
    assert list(panels) == ["One layer: 8 experts", "One layer: 64 experts"]
    assert [*panels["One layer: 64 experts"].lines[1].get_ydata()] == [1.25, 1 + 64 / 4096]
    assert draw(time_by_tokens(benchmarks[1:]), LIGHT) is None


def test_split_of_time(files, write, drawn):
    """Shares of what is drawn: a part below zero is not, and the others fill the bar."""
    (axes,) = split_of_time(load_benchmarks(files)).axes
    widths = [[round(bar.get_width(), 6) for bar in bars] for bars in axes.containers]
    assert [bars.get_label() for bars in axes.containers] == ["route", "gather", "experts", "combine"]
    assert widths == [[10] * 4 + [0], [20] * 4 + [0], [60] * 5, [10] * 4 + [40]]
    assert [text.get_text() for text in axes.texts] == ["10.0 ms"] * 4 + ["40.0 ms"]
    without = write("c.json", "communication", [row("ours", 4, 8, 2.0)])
    assert split_of_time(load_benchmarks([without])) is None


def test_many_panels_are_thinned_out(write, drawn):
    rows = [row("dense", experts, 2**power, 1.0) for power in range(20) for experts in (2, 4)]
    figure = draw(time_by_experts(load_benchmarks([write("a.json", "layer", rows)])), LIGHT)
    titles = [axes.get_title("left") for axes in figure.axes]
    assert len(titles) == MOST_PANELS and (titles[0], titles[-1]) == ("One layer: 1 token", "One layer: 524,288 tokens")
    assert f"Shown: {MOST_PANELS} of 20." in figure.texts[-1].get_text()


def test_files_of_one_program_are_told_apart(write):
    paths = [write(f"{name}.json", "layer", layer_rows()) for name in ("cpu", "gpu")]
    assert [benchmark.name for benchmark in load_benchmarks(paths)] == ["One layer (cpu)", "One layer (gpu)"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "it is no JSON"),
        ("[1]", 'it has no "benchmark" that is one of layer, train, communication'),
        ({"benchmark": "other"}, 'it has no "benchmark" that is one of'),
        ({"rows": []}, 'it has no "rows"'),
        ({"rows": [1]}, "row 1 is no object"),
        ({"rows": [{}]}, 'row 1 has no "candidate"'),
        ({"rows": [row("dense", 4, 0, 1.0)]}, 'row 1 has no "tokens" of 1 or more'),
        ({"rows": [row("a", 4, 8, 1.0), row("b", 4, 8, 1.0) | {"ratio": "x"}]}, 'row 2 has no "ratio" above 0'),
        ({"rows": [row("dense", 4, 8, float("nan"))]}, 'row 1 has no "seconds" above 0'),
        ({"rows": [row("dense", 4, 8, 1.0, peak_bytes="1 MB")]}, 'row 1 has a "peak_bytes" that is no number'),
        ({"rows": [row("hash", 4, 8, 1.0, parts={"route": "x"})]}, 'row 1 has no seconds of the part "route"'),
        ({"rows": [row("hash", 4, 8, 1.0, parts=[1])]}, 'row 1 has no seconds of the part "parts"'),
        ({"rows": [row("hash", 4, 8, 1.0)] * 2}, "2 rows are of hash with 4 experts and 8 tokens"),
    ],
)
def test_broken_and_foreign_files(content, message, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(content if isinstance(content, str) else json.dumps({"benchmark": "layer", **content}))
    with pytest.raises(UserError) as refused:
        write_benchmarks([path], tmp_path / "out", "T")
    assert str(refused.value).startswith(f"--benchmarks {path}: {message}") and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_wrong_calls_are_one_line(files, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for arguments, status, message in (
        (("--out", out), 2, "the following arguments are required: RUN or --benchmarks FILE"),
        ((tmp_path, "--benchmarks", files[0], "--out", out), 2, "RUN does not go with --benchmarks"),
        (("--benchmarks", "--out", out), 2, "--benchmarks: expected at least one argument"),
        (("--benchmarks", tmp_path / "none", "--out", out), 1, f"cannot read --benchmarks {tmp_path}/none: No such"),
        (("--benchmarks", tmp_path, "--out", out), 1, f"cannot read --benchmarks {tmp_path}: Is a directory"),
        (("--benchmarks", tmp_path / "binary", "--out", out), 1, f"--benchmarks {tmp_path / 'binary'}: it is no JSON"),
        (("--benchmarks", files[0], files[0], "--out", out), 1, f"{files[0]} was given twice; name each file once"),
    ):
        found, said, err = call("report", *arguments)
        assert (found, said) == (status, "") and message in err and err.count("\n") == 1, err
    assert not out.exists()
