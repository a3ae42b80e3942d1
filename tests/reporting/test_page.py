"""The page of a report: it shows the other files' numbers, stands alone, and takes every name as text.

How it behaves in a browser is tested in test_page_browser.py.
"""

import base64
import json
import re
import shutil

import pandas as pd
import pytest
from html_page import Page
from made_runs import markdown_table, model_record, write_run

from fairseq_hash.reporting import page
from fairseq_hash.reporting.report import write_report

pytestmark = pytest.mark.usefixtures("unrendered")


def test_the_page_shows_the_same_table(reported):
    shown = markdown_table((reported / "results.md").read_text())
    rows = [list(next(iter(shown.values()))), *(list(cells.values()) for cells in shown.values())]
    assert Page.of(reported / "index.html").tables[0] == rows and len(rows) == 4


def test_the_page_is_self_contained(reported):
    """Both figures for light and dark screens, as data, where no scripts run; nothing is loaded from elsewhere."""
    text = (reported / "index.html").read_text()
    seen = Page.of(reported / "index.html")
    assert len(seen.sources) == 4 and all(source.startswith("data:image/png;base64,") for source in seen.sources)
    images = [base64.b64decode(source.partition(",")[2], validate=True) for source in seen.sources]
    assert len(set(images)) == 4
    # A dark screen takes the source before the picture; the files are those for paper.
    written = [(reported / name).read_bytes() for name in ("learning_curves.png", "expert_loads.png")]
    assert images[1::2] == written
    assert not {"link", "iframe", "object", "embed", "b"} & set(seen.tags)
    assert re.findall(r"https?://[^\s)\"]+", text) == [
        "https://github.com/leeoniya/uPlot"
    ]  # in the library's first comment
    assert not re.search(r"url\(|@import|<script[^>]* src", text)
    assert seen.policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    assert seen.tags.index("meta") < seen.tags.index("script")


def test_the_page_tells_all(made, reported):
    """The left-out run with its reason, note, provenance, and a title whose signs are no HTML."""
    seen = Page.of(reported / "index.html")
    again, why = str(reported.parents[1] / "again"), f"same options and seed as {made / 'hash5'}"
    assert [["Run", "Why"], [again, why]] in seen.tables
    assert f"| {again} | {why} |" in (reported / "results.md").read_text()
    assert "Runs & <b>more</b>" in seen.text and "A first paragraph, of < 3 lines." in seen.text
    record = model_record(made / "hash5")
    for key in ("torch", "fairseq", "python", "dictionary_fingerprint", "table_fingerprint", "processor"):
        assert any(str(record[key]) in row[-1] for table in seen.tables for row in table), key
    assert f"4 runs, {record['date'][:10]}" in seen.text
    assert "One seed only of Hash and Switch: " in seen.text


def test_names_are_text_on_the_page(copies, tmp_path):
    """Of a run that is compared (with its commands), and of one that is left out."""
    name = "<script>alert('&')"
    folder = (copies / "hash5").rename(copies / name)
    record = {"commands": {"train": ["python", "<i>", "a b"]}, "data": "<u>", "data_fingerprint": "f" * 64}
    (folder / "run.json").write_text(json.dumps(record))
    shutil.copytree(folder, copies / f"{name} 2")
    write_report([folder, copies / f"{name} 2"], tmp_path / "out", "T")
    seen = Page.of(tmp_path / "out" / "index.html")
    assert not {"i", "u"} & set(seen.tags) and seen.tags.count("script") == 3 + len(seen.charts)
    assert name in seen.text and "python '<i>' 'a b'" in seen.text and "<u>" in seen.text
    assert [str(copies / f"{name} 2"), f"same options and seed as {folder}"] in [r for t in seen.tables for r in t]


def test_every_left_out_run_is_named(tmp_path):
    """Many, with long names: no table is cut short."""
    many = [write_run(tmp_path / f"{'long-' * 30}{number}") for number in range(70)]
    write_report(many, tmp_path / "out", "T")
    rows = [row for table in Page.of(tmp_path / "out" / "index.html").tables for row in table]
    text = (tmp_path / "out" / "results.md").read_text()
    for folder in many[1:]:
        assert [str(folder), f"same options and seed as {many[0]}"] in rows and f"| {folder} |" in text


def test_the_parts_of_a_page():
    """Paragraphs at empty lines; a table of words to the left."""
    assert page.paragraphs("a <\nb\n\n\n \n\nc") == "<p>a &lt; b</p>\n<p>c</p>"
    assert page.paragraphs(" \n ") == ""
    assert 'class="wide words"' in page.table(pd.DataFrame({"a": ["<"]}), words=True)
    assert "&lt;" in page.table(pd.DataFrame({"a": ["<"]}))
