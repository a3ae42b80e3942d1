"""`fairseq-hash tables build`, `show` and `compare`: their figures against a recount in plain Python."""

import io
import json
import statistics
import subprocess
import sys
from collections import Counter

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import reference
import torch
from called import call, shown, write_dictionary
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tables import FILES, assert_figures, done, embeddings, judged, naive_loads, rows_of, stream_of

from fairseq_hash.checkpoint.manifest import KEY, Manifest
from fairseq_hash.hashing import Feature, TableShape, build_table, dictionary_fingerprint, load_table
from fairseq_hash.hashing.dictionary import read_dictionary
from fairseq_hash.hashing.registry import BUILDERS
from fairseq_hash.table_tools.evaluate_balance import Judge
from fairseq_hash.table_tools.figures import loads_of_one, loads_of_several
from fairseq_hash.table_tools.token_streams import open_text


def test_a_table_by_hand(dictionary, tmp_path):
    """Counts 50, 30, 20, 10, 7 and 1 for each of fairseq's four symbols, on two experts, by descending count:
    50 | 30 + 20, then 10 | and 7, and the ones go where less is: 50 + 10 + 1 = 61 and 30 + 20 + 7 + 3 = 60."""
    out = done("build", dictionary, "--num-experts", 2, "--out", tmp_path / "a.table")
    assert out.startswith(f"wrote {tmp_path / 'a.table'}\n")
    rows = shown(out)
    assert rows["builder"] == "balanced" and rows["experts"] == "2" and rows["rows"] == "9"
    assert rows["rows that an expert serves"] == "3 to 6"
    assert rows["largest load / mean"] == f"{61 / 60.5:.4f}" == rows["no table is below"]
    assert rows["smallest load / mean"] == f"{60 / 60.5:.4f}"
    assert rows["coefficient of variation"] == f"{0.5 / 60.5:.4f}"
    assert rows["keys that overload"] == "0" and "building counts" in out
    again = done("show", tmp_path / "a.table", dictionary)
    assert shown(again) == shown(out) and "building counts" in again


def test_it_is_the_table_that_a_model_builds(dictionary, tmp_path):
    """Without a table file, --hash-table BUILDER gives the same ones, with several columns, too."""
    symbols, counts = read_dictionary(dictionary)
    for builder in BUILDERS:
        for option, many in (("--experts-per-token", False), ("--multi-hash", True)):
            if many and builder in ("modulo", "round-robin"):
                continue
            out = tmp_path / f"{builder}{option}"
            done("build", dictionary, "--builder", builder, "--num-experts", 4, option, 3, "--seed", 7, "--out", out)
            built = build_table(builder, symbols, counts, TableShape(4, 3, many), 7)
            loaded = load_table(out)
            assert loaded.fingerprint == built.fingerprint
            assert loaded.record.counts_fingerprint == built.record.counts_fingerprint


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 10**9), min_size=5, max_size=5),
    st.integers(1, 9),
    st.sampled_from(["balanced", "random"]),
    st.integers(0, 2**31),
)
def test_any_table_by_plain_python(tmp_path_factory, counts, num_experts, builder, seed):
    """Built with counts of 2 and more, then judged on others: its load is summed here expert by expert."""
    folder = tmp_path_factory.getbasetemp()
    built_on = [2 + count % 7 for count in counts]
    options = ("--builder", builder, "--num-experts", num_experts, "--seed", seed, "--out", folder / "any.table")
    done("build", write_dictionary(folder / "built.txt", built_on), *options, "--overwrite")
    out = done("show", folder / "any.table", write_dictionary(folder / "other.txt", counts))
    if builder == "balanced":
        experts = reference.balanced_hash([1, 1, 1, 1, *built_on], num_experts)
    else:
        keys = [token + (seed << 32) for token in range(9)]
        experts = [reference.splitmix64(reference.splitmix64(key)) % num_experts for key in keys]
    load = naive_loads([[expert] for expert in experts], [1, 1, 1, 1, *counts], num_experts)
    served = [experts.count(expert) for expert in range(num_experts)]
    mean, rows = statistics.fmean(load), shown(out)
    assert rows["builder"] == ("balanced" if builder == "balanced" else f"random, seed {seed}")
    assert rows["rows that an expert serves"] == f"{min(served)} to {max(served)}"
    assert ("other counts" in out) == (builder == "balanced" and built_on != counts)
    # Four decimals are printed; the last may be rounded the other way.
    for name, value in (
        ("largest load / mean", max(load) / mean),
        ("smallest load / mean", min(load) / mean),
        ("coefficient of variation", statistics.pstdev(load) / mean),
    ):
        assert float(rows[name]) == pytest.approx(value, abs=1.01e-4 / 2)


@pytest.mark.parametrize("columns", [1, 2])
def test_every_builder_on_held_out_text(data, tmp_path, columns):
    """Each is built, then all are compared: every load by plain Python, in building text and held-out text."""
    symbols, _ = read_dictionary(data / "dict.txt")
    checkpoint = embeddings(tmp_path / "dense.pt", symbols)
    train, valid = (stream_of(data.parent / f"{split}.txt", symbols) for split in ("train", "valid"))
    text, k = ["--text", data], ["--experts-per-token", columns]
    of_builder = {"balanced": text, "scattered": text, "random": [], "modulo": [], "round-robin": []}
    of_builder["clusters"] = ["--embeddings", checkpoint]
    of_builder |= {"dispersed": [*of_builder["clusters"], "--clusters", 5, *text], "spread": text}
    for builder, more in of_builder.items():
        given = ("--builder", builder, "--num-experts", 24, *k, *more, "--out", tmp_path / builder)
        out = done("build", data / "dict.txt", *given)
        assert ("only the number of its symbols was checked" in out) == (builder in ("clusters", "dispersed"))
    files = [tmp_path / builder for builder in of_builder]
    out = done("compare", *files, data / "dict.txt", *text, "--held-out", data, "--out", tmp_path / "out")
    assert all(out.count(builder) >= 2 for builder in of_builder)
    for builder, on in zip(of_builder, judged(tmp_path / "out"), strict=True):
        table = load_table(tmp_path / builder)
        built_on = "building counts" if builder in ("balanced", "scattered", "dispersed", "spread") else "counts"
        for what, stream in ((built_on, train), ("held-out text", valid)):
            if builder == "spread":
                rows = rows_of(table, torch.tensor([stream]))[0].tolist()
                heavy = {token for token, count in Counter(train).items() if count > columns * len(train) / 24}
                assert heavy == set(np.flatnonzero(table.index["heavy"]).tolist()) != set()
                assert all((row != token) <= (token in heavy) for row, token in zip(rows, stream, strict=True))
            else:
                rows = stream
            counts = [Counter(rows)[row] for row in range(len(table.expert_HK))]
            assert_figures(on[what], naive_loads(table.expert_HK.tolist(), counts, 24), counts)
    again = done("compare", *files, "--dictionary", data / "dict.txt", *text, "--held-out", data)
    assert again == out[: out.index("wrote")]


def test_a_spread_table_can_start_from_a_scattered_one(data, tmp_path):
    """All rows but those of pairs are the scattered table's, and the record says so."""
    options = ("--num-experts", 24, "--experts-per-token", 2, "--text", data, "--seed", 3)
    done("build", data / "dict.txt", "--builder", "scattered", *options, "--out", tmp_path / "base")
    spread = ("--builder", "spread", "--base", "scattered", "--out", tmp_path / "spread")
    done("build", data / "dict.txt", *spread, *options)
    base, spread = load_table(tmp_path / "base"), load_table(tmp_path / "spread")
    assert np.array_equal(spread.expert_HK[: len(base.expert_HK)], base.expert_HK) and len(spread.index["pair"])
    assert (spread.record.builder, spread.record.seed, spread.record.settings["base"]) == ("spread", 3, "scattered")


def test_the_folder(data, tmp_path):
    """A page with the figure in it for light and dark screens, the figure, CSV and JSON; words are not markup."""
    counted = tmp_path / "dict.txt"
    counted.write_text("[red]<b> 900\n" + "".join(f"w{number} {90 - number}\n" for number in range(30)))
    done("build", counted, "--num-experts", 4, "--out", tmp_path / "t")
    out = done("show", tmp_path / "t", counted, "--out", tmp_path / "deep" / "out")
    folder = tmp_path / "deep" / "out"
    assert out.splitlines()[-4:] == [f"wrote {folder / name}" for name in FILES]
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert "[red]<b>" in out
    page = (folder / "index.html").read_text()
    assert "[red]&lt;b&gt;" in page and "<b>" not in page and page.count("data:image/png;base64,") == 2
    picture = matplotlib.image.imread(io.BytesIO((folder / "loads.png").read_bytes()))
    assert picture.shape[0] > 300 and picture.shape[1] > 800 and picture.std() > 0.01
    facts = json.loads((folder / "balance.json").read_text())
    assert {"fairseq_hash", "commit", "torch", "date"} <= set(facts["provenance"])
    assert facts["tables"][0]["judged"][0]["overloading"][0]["key"] == "[red]<b>"
    assert facts["tables"][0]["fingerprint"] == load_table(tmp_path / "t").fingerprint
    frame = pd.read_csv(folder / "balance.csv")
    assert frame["largest_over_mean"][0] == facts["tables"][0]["judged"][0]["largest_over_mean"]
    done("show", tmp_path / "t", counted, "--out", folder)  # once more, into the same folder


def test_embeddings_of_this_dictionary(data, tmp_path):
    """A manifest says which dictionary a checkpoint is of: nothing is noted then, another one is refused."""
    symbols, _ = read_dictionary(data / "dict.txt")
    options = ["build", data / "dict.txt", "--builder", "clusters", "--num-experts", 4, "--overwrite"]
    options += ["--out", tmp_path / "t"]
    for fingerprint in (dictionary_fingerprint(symbols), "0" * 64):
        manifest = Manifest("save", 1, 1, "none", fingerprint, None)
        path = embeddings(tmp_path / "c.pt", symbols, **{KEY: manifest.to_plain()})
        status, out, err = call("tables", *options, "--embeddings", path)
        assert status == (fingerprint == "0" * 64) and "note" not in out
    assert f"{path} belongs to dictionary 000000000000" in err


def run_without(module, calls):
    """Run `fairseq-hash tables` several times in a process where a module cannot be imported."""
    program = f"import sys\nsys.modules[{module!r}] = None\nfrom fairseq_hash.cli import main\n"
    program += "\n".join(f"assert main({['tables', *map(str, words)]}) == 0" for words in calls)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_it_needs_no_fairseq(data, tmp_path):
    """Everything, of binarized text as well, where fairseq cannot be imported."""
    symbols, _ = read_dictionary(data / "dict.txt")
    checkpoint = embeddings(tmp_path / "dense.pt", symbols)
    listed, out = data / "dict.txt", tmp_path / "t"
    build = ["build", listed, "--num-experts", 4, "--builder", "dispersed", "--embeddings", checkpoint]
    calls = [
        [*build, "--text", data, "--out", out],
        ["show", out, listed, "--held-out", data, "--out", tmp_path / "folder"],
        ["export", out, "--out", tmp_path / "t.npy"],
    ]
    run_without("fairseq", calls)
    assert len(np.load(tmp_path / "t.npy")) == len(symbols)


def test_tables_of_a_dictionary_need_no_torch(data, tmp_path):
    """Importing it takes longer than all that is done here."""
    listed, out = data / "dict.txt", tmp_path / "t"
    calls = [
        *(["build", listed, "--num-experts", 4, "--builder", name, "--out", tmp_path / name] for name in BUILDERS),
        ["build", listed, "--num-experts", 4, "--multi-hash", 2, "--restarts", 3, "--out", out],
        ["show", out, listed, "--out", tmp_path / "folder"],
        ["compare", tmp_path / "random", tmp_path / "balanced", listed],
        ["export", tmp_path / "random", "--out", tmp_path / "t.safetensors"],
        ["import", tmp_path / "t.safetensors", listed, "--num-experts", 4, "--out", tmp_path / "back"],
    ]
    run_without("torch", calls)
    assert load_table(tmp_path / "back").fingerprint == load_table(tmp_path / "random").fingerprint


def test_figures_are_the_loads(dictionary, tmp_path):
    """A line and points of the same experts, by descending load; lines at mean and bounds. Of several, a panel for the
    counts and one for held-out text, where a table of words or buckets has the latter only."""
    symbols, listed = read_dictionary(dictionary)
    (tmp_path / "text").write_text("the of the and table table table\n")
    text = open_text(tmp_path / "text", "", symbols)
    judge = Judge(symbols, (np.array(listed), "dict.txt"), None, text)
    tables = {
        "balanced": build_table("balanced", symbols, listed, TableShape(3), 1),
        "bigrams": build_table("random", symbols, listed, TableShape(3, feature=Feature("bigram"), num_keys=5), 1),
    }
    judged = [judge.judge(name, table) for name, table in tables.items()]
    on_counts, on_text = judged[0].judged
    order = sorted(range(3), key=lambda expert: -on_counts.balance.load_E[expert])
    (chart,) = loads_of_one(judged[0])
    heights = [[one.balance.load_E[expert] / one.balance.mean for expert in order] for one in (on_counts, on_text)]
    lines = {line.name: list(line.y) for line in chart.lines}
    assert lines[f"building counts: largest {max(heights[0]):.3f}"] == pytest.approx(heights[0])
    assert lines[f"held-out text: largest {max(heights[1]):.3f}"] == pytest.approx(heights[1])
    assert lines["mean: every expert the same"] == [1, 1] and len(lines) == 5
    first, second = loads_of_several(judged)
    assert first.title == "Building counts" and second.title == "Held-out text"
    assert list(first.lines[0].y) == pytest.approx(sorted(heights[0], reverse=True))
    assert len(first.lines) == 2 and len(second.lines) == 3
    assert list(second.lines[1].y) == pytest.approx(
        sorted(judged[1].judged[0].balance.load_E / judged[1].judged[0].balance.mean, reverse=True)
    )
