"""README's picture: what the repository holds is what the script draws of the results that it names."""

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]


def test_the_picture_shows_the_results():
    """The same bytes again; the words are the table's cells; the bars have their lengths."""
    drawn = runpy.run_path(str(ROOT / "scripts/picture.py"))
    stored = drawn["PICTURE"].read_text(encoding="utf-8")
    assert stored == drawn["picture"]() and len(stored.encode()) < 100_000
    svg = ElementTree.fromstring(stored)
    words = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    table = (ROOT / "benchmarks/results/studies/main/results.md").read_text(encoding="utf-8").splitlines()
    bars = {element.get("y"): element for element in svg.iter("{http://www.w3.org/2000/svg}rect") if element.get("y")}
    for number, (name, in_report) in enumerate(drawn["SHOWN"].items()):
        row = next(line for line in table if re.match(rf"\| {in_report} \| \d", line))
        value = row.split(" | ")[1]
        assert words[words.index(name) + 1] == value
        assert float(bars[str(80 + 46 * number)].get("width")) == round(12 * float(value.split()[0]), 1)
    for start, name in (("counts of 4 tokens", "4 tokens"), ("3 tokens", "3 tokens (trigram)")):
        value = next(line for line in table if line.startswith(f"| Kneser-Ney, {name} |")).split(" | ")[1]
        assert f"{start} {value}" in words
    assert "prefers-color-scheme: dark" in stored and "http" not in stored.replace("http://www.w3.org/2000/svg", "")


def test_the_picture_of_ranks_shows_the_results():
    """The same bytes again; a bar for each figure of the table, of its length."""
    drawn = runpy.run_path(str(ROOT / "scripts/picture_ranks.py"))
    stored = drawn["PICTURE"].read_text(encoding="utf-8")
    assert stored == drawn["picture"]() and len(stored.encode()) < 20_000
    svg = ElementTree.fromstring(stored)
    widths = [
        float(bar.get("width")) for bar in svg.iter("{http://www.w3.org/2000/svg}rect") if bar.get("class") != "card"
    ]
    table = (ROOT / "benchmarks/results/even_ranks.md").read_text(encoding="utf-8").splitlines()
    heads = next(line for line in table if line.startswith("| table ")).strip("| ").split(" | ")
    columns = [heads.index(f"{name}: straggler") for name in ("contiguous", "balanced", "with replicas")]
    expected = []
    for about in ("balanced | 16", "balanced | 64", "random | 16", "random | 64"):
        cells = next(line for line in table if line.startswith(f"| {about} | 4,096")).strip("| ").split(" | ")
        expected += [round(120 * float(cells[column]), 1) for column in columns]
    assert widths == expected
