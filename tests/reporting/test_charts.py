"""Charts as data: what is thinned out, what JSON cannot hold, colours that can be read, and the library's origin."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from html_page import Page, contrast
from hypothesis import given
from hypothesis import strategies as st
from made_runs import write_run

from fairseq_hash.reporting import page
from fairseq_hash.reporting.charts import MOST_POINTS, Chart, Line, as_json, figure_of, thinned_out
from fairseq_hash.reporting.comparison import compare
from fairseq_hash.reporting.comparison_page import comparison_page
from fairseq_hash.reporting.curves import learning_charts
from fairseq_hash.reporting.loads import load_charts
from fairseq_hash.reporting.naming import group_by_model
from fairseq_hash.reporting.runs import load_runs
from fairseq_hash.reporting.scaling import scaling_charts
from fairseq_hash.reporting.theme import COLOURS, DARK, LIGHT

VENDOR = Path(page.__file__).parent / "vendor"


def chart_of(*lines):
    return Chart("T", "x", "y", list(lines), (0, 1), (0, 1))


@given(st.lists(st.one_of(st.floats(-9, 9), st.just(np.nan), st.just(np.inf)), max_size=400), st.integers(8, 60))
def test_what_is_left_of_a_long_line(values, most):
    """Ends, extremes and gaps; never more than asked for, all where there is room."""
    values = np.array(values)
    kept = thinned_out(values, most)
    assert [*kept] == sorted({*kept}) and len(kept) <= max(most, min(len(values), most))
    if len(values) <= most:
        assert len(kept) == len(values)
        return
    assert {0, len(values) - 1} <= {*kept}
    finite = values[np.isfinite(values)]
    if len(finite):
        left = values[kept][np.isfinite(values[kept])]
        assert (left.min(), left.max()) == (finite.min(), finite.max())
    assert np.isfinite(values).all() == np.isfinite(values[kept]).all()


def test_two_million_points_are_few_on_the_page():
    """The least of them, at an unknown place, is there."""
    values = np.random.default_rng(0).random(2_000_000) + 1
    values[1_234_567] = 0.5
    line = Line("A", "", np.arange(2_000_000.0), values, 0)
    (drawn,) = as_json(chart_of(line))["lines"]
    assert len(drawn["x"]) == len(drawn["y"]) <= MOST_POINTS and drawn["x"][drawn["y"].index(0.5)] == 1_234_567
    assert len(figure_of(chart_of(line))) < 500_000


def test_what_json_and_html_do_not_know():
    """Gaps, whole numbers, and names that would end the script."""
    name = "</script><b>'&\u2028"
    x, y = np.array([1.0, 2.0, 3.0, 12_345_678.0]), np.array([np.nan, 1 / 3, -np.inf, 5.0])
    html = figure_of(chart_of(Line(name, "w", x, y, None, 7, spread=np.array([[1, 2]] * 3 + [[np.nan, 4]]))))
    assert html.count("<") == 6 and "</script><b>" not in html
    parser = Page()
    parser.feed(html)
    (line,) = parser.charts[0]["lines"]
    assert line["name"] == name and line["y"] == [None, 0.333333, None, 5] and line["x"] == [1, 2, 3, 12_345_678]
    assert line["dash"] == 3 and line["colour"] is None and line["spread"][3] == [None, 4]


def test_charts_of_runs_are_the_logs_numbers(tmp_path):
    """By hand, of two seeds: curves, loads over the uniform share, means over seeds by the number of experts."""
    loads = {"layer1_load": [0.1, 0.5, 0.2, 0.2], "layer1_load_max": 2, "layer1_load_cv": 1, "layer1_dropped": 0}
    for experts, seed, valid in ((4, 1, 30), (4, 2, 32), (8, 1, 27)):
        curve = [{"ppl": 90 - seed - 10 * update, **loads} for update in range(4)]
        options = {"common.seed": seed}
        write_run(tmp_path / f"{experts}-{seed}", None, options, {"valid": valid}, curve, num_experts=experts)
    models = group_by_model(load_runs([tmp_path]))
    updates, minutes = learning_charts(models)
    line = next(line for line in updates.lines if line.what == "validation, seed 2")
    assert ([*line.x], [*line.y]) == ([1, 2, 3, 4], [88, 78, 68, 58])
    assert updates.values["Hash num_experts=4"] == "58.5"
    assert [*minutes.lines[0].x] == [0.5, 1, 1.5, 2]
    (load,) = load_charts(models)
    assert [*load.lines[0].y] == pytest.approx([2, 0.8, 0.8, 0.4])
    assert load.values["Hash num_experts=8"] == "largest 2.00"
    (scaling,) = scaling_charts(models)
    (line,) = scaling.lines
    assert ([*line.x], [*line.y], line.spread.tolist()) == ([4, 8], [31, 27], [[30, 32], [27, 27]])


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_contrast(theme):
    """Text and lines of 4.5 to 1, also on a table's band; edges of controls 3 to 1 (WCAG AA)."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    colours = page.colours_on_page(theme)
    text = ["ink", "soft", "neutral", "link", *(f"c{place}" for place in range(len(COLOURS)))]
    for name in text:
        assert contrast(colours[name], colours["paper"]) >= 4.5, name
    for name in ("ink", "soft", "link"):
        assert contrast(colours[name], colours["band"]) >= 4.5, name
    assert min(contrast(colours["control"], colours[under]) for under in ("paper", "band")) >= 3
    assert len({colours[name] for name in text}) == len(text) - 2  # soft is neutral, links are blue


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("98 s", 98), ("12.5 min", 750), ("3.2 h", 11_520), ("5.00 M", 5e6), ("1.2 B", 1.2e9), ("0.45 GB", 4.5e8)),
        *(("89.54 ± 0.23", 89.54), ("23.16 (A)", 23.16), ("12.50 (11.25 to 15.00)", 12.5), ("9.5%", 0.095)),
        *(("–", ""), ("", ""), ("nan", ""), ("Hash 1x64", None), ("3 of 4", None), ("2026-01-01", None)),
        *(("1e-05", 1e-5), ("1,024", 1024)),
    ],
)
def test_what_cells_are_sorted_by(text, value):
    found = page.sort_value(text)
    assert found == pytest.approx(value) if isinstance(value, float | int) else found == value


def test_columns_of_words_are_sorted_as_words():
    """One cell that is no number makes a column words."""
    html = page.table(pd.DataFrame({"A": ["1", "x"], "B": ["2 s", "–"], "<C>": ["–", "–"]}), label='"L"')
    assert re.findall(r'data-sort="([^"]*)"', html) == ["2.0", ""]
    assert 'aria-label="&quot;L&quot;"' in html and "&lt;C&gt;" in html and html.count('<th scope="col">') == 3


def test_the_page_is_small_and_the_library_as_it_came(tmp_path):
    """Below 1 MB before data; the files' sums are those that the note beside them gives, its licence is in the page."""
    write_run(tmp_path / "run")
    text = comparison_page(compare([tmp_path], "T"), {})
    assert len(text.encode()) < 150_000 and "Copyright (c) 2022 Leon Sorokin" in text
    note = (VENDOR / "README.md").read_text()
    for name, digest in re.findall(r"`(\S+)` \| `([0-9a-f]{64})`", note):
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, name
    assert len(re.findall("[0-9a-f]{64}", note)) == 2
    assert all(path.stat().st_size < 100_000 for path in VENDOR.iterdir())


def test_a_page_of_one_run_whose_numbers_are_none(tmp_path):
    write_run(tmp_path / "run", intervals=[{"ppl": "nan"}, {"ppl": "inf"}], perplexities={"valid": 20})
    text = comparison_page(compare([tmp_path], "T"), {})
    charts = [json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', text)]
    assert len(charts) == 2 and charts[0]["lines"][0]["y"] == [None, None] and charts[0]["values"] == {"Hash": "inf"}
    for low, high in (charts[0]["xRange"], charts[0]["yRange"]):
        assert np.isfinite([low, high]).all() and low < high
