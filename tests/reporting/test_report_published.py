"""Published figures in a report: apart, with their mark and a legend, and only those that may be printed."""

import csv
import json
import re

import pytest
from made_runs import markdown_table, write_run

from fairseq_hash.core.errors import UserError
from fairseq_hash.reporting import published
from fairseq_hash.reporting.comparison import compare
from fairseq_hash.reporting.comparison_table import for_readers
from fairseq_hash.reporting.report import write_report
from fairseq_hash.reporting.runs import load_run

pytestmark = pytest.mark.usefixtures("unrendered")
CURVE = {2: "40.5 A", 4: "30.25 M", 9: "9.5 S"}
HASH = {"name": "Hash", "table": "t", "vocabulary": 100, "corpus": "a corpus"}
HASH["published"] = {"valid": "23.16 A", "test": "23.20 S", "valid_by_update": CURVE}
SWITCH = {
    "name": "Switch",
    "table": "t",
    "vocabulary": 100,
    "corpus": "a corpus",
    "published": {"valid": "31.41 M", "test": "27.18 C"},
}


def test_only_figures_with_a_mark_of_the_authors_or_of_notes(tmp_path):
    """By hand; what is from memory or arithmetic is none."""
    runs = [load_run(write_run(tmp_path / "hash", HASH)), load_run(write_run(tmp_path / "switch", SWITCH))]
    for found, expected in (
        (published.figures_of(runs[:1]), {"valid": (23.16, "A"), "test": (23.20, "S")}),
        (published.curve_of(runs[:1]), {2: (40.5, "A"), 9: (9.5, "S")}),
    ):
        assert {name: (figure.perplexity, figure.mark) for name, figure in found.items()} == expected
    assert published.figures_of(runs[1:]) == published.curve_of(runs[1:]) == {}


@pytest.mark.parametrize("text", ["23.16", "A 23.16", "about 23 A", "23.16 a", 23.16])
def test_a_figure_without_its_mark_is_refused(tmp_path, text):
    run = load_run(write_run(tmp_path / "run", HASH | {"published": {"valid": text}}))
    line = r"/run: experiment\.published\.valid is '.*'; a published .* '23\.16 A'$"
    with pytest.raises(UserError, match=line) as caught:
        published.figures_of([run])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("nothing", [{}, None, {"valid": None}, {"valid_by_update": {}}])
def test_no_published_figures(tmp_path, nothing):
    comparison = compare([write_run(tmp_path / "run", HASH | {"published": nothing})], "T")
    assert comparison.legend == "" and not [name for name in comparison.of_models if "published" in name]
    assert list(for_readers(comparison.of_models)["Model"]) == ["Hash"]


def test_columns_marks_and_legend_in_every_file(tmp_path):
    """Beside the measured ones, which stay as they are; nothing from memory is in any file."""
    for name, experiment in (("hash", HASH), ("switch", SWITCH)):
        write_run(tmp_path / name, experiment, router=name)
    write_report([tmp_path / "hash", tmp_path / "switch"], tmp_path / "out", "T")
    text, page = ((tmp_path / "out" / name).read_text() for name in ("results.md", "index.html"))
    shown = markdown_table(text)
    names = ("Valid perplexity", "Test perplexity", "Published valid", "Published test")
    assert [shown["Hash"][name] for name in names] == ["20.00", "21.00", "23.16 (A)", "23.20 (S)"]
    assert [shown["Switch"][name] for name in names] == ["20.00", "21.00", "–", "–"]
    legend = "Published perplexities were not measured by this project. Their marks: A: the authors' own"
    for content in (text, re.sub("<[^>]*>", "", page)):
        assert legend in content.replace("&#x27;", "'")
        assert "S: secondary notes" in content and "do not compare with these runs" not in content
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [(row["published_valid"], row["published_valid_mark"]) for row in rows] == [("23.16", "A"), ("", "")]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["published_test"] for row in results["models"]] == [23.2, None]
    assert "not measured" in results["legend"]
    for path in (tmp_path / "out").iterdir():
        if path.suffix != ".png":
            assert not re.search(r"31\.41|27\.18|30\.25", re.sub(r"base64,[^\"]*", "", path.read_text())), path


def test_another_dictionary_is_told(tmp_path):
    """104 symbols, 4 of them fairseq's own, are near 100 and 96, not 8,000."""
    runs = [load_run(write_run(tmp_path / str(size), HASH | {"vocabulary": size})) for size in (100, 96, 8000)]
    assert [published.is_comparable(run) for run in runs] == [True, True, False]
    words = "They do not compare with these runs, whose dictionary has 104 symbols and not 8,000, and are left out of"
    assert published.legend({"Hash": runs[2:]}).endswith(f"{words} the figures.")
    assert published.legend({"Hash": runs[:1]}).endswith("wherever both have a figure.")


@pytest.mark.parametrize(
    ("of_figures", "of_data", "words"),
    [
        ("a corpus", "a corpus", None),
        ("Reddit", "text", "of text and not of Reddit"),  # its own text, whatever the folder is called
        ("Reddit", "cut", "of cut and not of Reddit"),
        ("Reddit", None, "of an unnamed corpus and not of Reddit"),  # fairseq-preprocess leaves no record
        (None, None, "of an unnamed corpus and not of a named one"),
        (None, "text", "of text and not of a named one"),
    ],
)
def test_another_corpus_is_told(tmp_path, of_figures, of_data, words):
    """A dictionary of the same size says nothing of the text."""
    run = load_run(write_run(tmp_path / "run", HASH | {"corpus": of_figures}, corpus=of_data))
    assert published.is_comparable(run) is (words is None)
    assert (f"whose data are {words}, and are" in published.legend({"Hash": [run]})) is (words is not None)
