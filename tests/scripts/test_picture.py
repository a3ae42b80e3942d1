"""README's picture: what the repository holds is what the script draws of the results that it names."""

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]


def test_the_picture_shows_the_results():
    """The same bytes again; the words are the table's cells; the longest bar is the highest perplexity."""
    drawn = runpy.run_path(str(ROOT / "scripts/picture.py"))
    stored = drawn["PICTURE"].read_text(encoding="utf-8")
    assert stored == drawn["picture"]() and len(stored.encode()) < 100_000
    svg = ElementTree.fromstring(stored)
    words = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    table = (ROOT / "benchmarks/results/laptop.md").read_text(encoding="utf-8")
    models = table.partition("\n\nWhat counts")[0]
    bars = {element.get("y"): element for element in svg.iter("{http://www.w3.org/2000/svg}rect") if element.get("y")}
    for name in drawn["SHOWN"]:
        (row,) = (line for line in models.splitlines() if line.startswith(f"| {name} |"))
        value = row.split(" | ")[1]
        assert words[words.index(name) + 1] == value
        y = 80 + 46 * drawn["SHOWN"].index(name)
        assert float(bars[str(y)].get("width")) == round(230 / 110 * float(value.split()[0]), 1)
    for name in ("Bigram", "Trigram"):
        value = re.search(rf"{name} \| ([\d.]+)", table)[1]
        assert f"{name.lower()} counts {value}" in words
    assert "prefers-color-scheme: dark" in stored and "http" not in stored.replace("http://www.w3.org/2000/svg", "")
