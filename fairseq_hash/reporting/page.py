"""The page of a report: one HTML file with everything in it, for light and dark screens, with and without scripts."""

import base64
import functools
import re
import shlex
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

import pandas as pd

from fairseq_hash.reporting.theme import COLOURS, DARK, DPI, LIGHT, Theme

# The page makes no request, whatever a name in it contains.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
HERE = Path(__file__).parent
# Factors of the units that a column may mix.
UNITS = {"s": 1, "min": 60, "h": 3600, "M": 1e6, "B": 1e9, "MB": 1e6, "GB": 1e9, "ms": 1e-3, "%": 0.01, "": 1}
CELL = re.compile(r"(-?[\d,]+(?:\.\d+)?(?:e[+-]?\d+)?)\s?(%|[A-Za-z]*)(?: [±(].*)?")


def render(title: str, subtitle: str, parts: Sequence[str], reload_seconds: "float | None" = None) -> str:
    """Return the whole page: a heading and the parts, which are HTML. A watched page reloads itself."""
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    style = _colours() + _read("vendor/uPlot.min.css") + _read("assets/page.css")
    head += f"<title>{escape(title)}</title><style>{style}</style>"
    watched = ""
    if reload_seconds is not None:
        head += f'<noscript><meta http-equiv="refresh" content="{reload_seconds:g}"></noscript>'
        watched = f' data-reload="{reload_seconds:g}" data-written="{time.time():.0f}"'
    body = f'<h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p>' + "\n".join(parts)
    library = f"<script>/* uPlot\n{_read('vendor/LICENSE')}*/\n{_read('vendor/uPlot.iife.min.js')}</script>"
    own = f"<script>{_read('assets/tables.js')}</script><script>{_read('assets/charts.js')}</script>"
    page = f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n<main{watched}>\n{body}\n</main>\n'
    return f"{page}{library}{own}\n</body>\n</html>\n"


@functools.cache
def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _colours() -> str:
    """Return the themes of the figures as variables for style and scripts."""
    light, dark = (
        "; ".join(f"--{name}: {colour}" for name, colour in colours_on_page(theme).items()) for theme in (LIGHT, DARK)
    )
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


def colours_on_page(theme: Theme) -> dict[str, str]:
    """Return the colours of a page by variable name."""
    lines = {f"c{number}": theme.colour(number) for number in range(len(COLOURS))}
    band, control = ("#f4f6f8", "#7b8591") if theme is LIGHT else ("#1d2126", "#7d8794")
    own = {"paper": theme.paper, "ink": theme.ink, "soft": theme.neutral, "neutral": theme.neutral, "line": theme.faint}
    return {**own, "band": band, "control": control, "link": lines["c0"], **lines}


def section(heading: str, *parts: str) -> str:
    """Return a heading and the content under it."""
    return f"<h2>{escape(heading)}</h2>\n" + "\n".join(parts)


def paragraphs(text: str) -> str:
    """Return plain text as HTML; an empty line starts a new paragraph."""
    return "\n".join(f"<p>{escape(' '.join(part.split()))}</p>" for part in text.split("\n\n") if part.strip())


def table(content: pd.DataFrame, words: bool = False, label: str = "Table") -> str:
    """Return a table of text whose headings sort it, in a box that scrolls by itself.

    `words`: whether all columns are left-aligned; `label` is the name of the box for screen readers.
    """
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in content.columns)
    columns = [[sort_value(str(cell)) for cell in content.iloc[:, column]] for column in range(content.shape[1])]
    numbers = [any(isinstance(value, float) for value in column) and None not in column for column in columns]
    rows = []
    for place, cells in enumerate(content.to_numpy().tolist()):
        shown = []
        for column, cell in enumerate(cells):
            value = f' data-sort="{columns[column][place]}"' if numbers[column] else ""
            shown.append(f"<td{value}>{escape(str(cell))}</td>")
        rows.append(f"<tr>{''.join(shown)}</tr>")
    box = (
        f'<div class="wide {"words" if words else "numbers"}" role="region" tabindex="0" aria-label="{escape(label)}">'
    )
    return f'{box}<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def sort_value(text: str) -> "float | str | None":
    """Return a cell's sort key: its number in the smallest unit, "" if there is none, None for words.

    `98 s` stands before `12.5 min`; a spread or quartiles after a number do not count.
    """
    if text.strip() in ("", "–", "nan", "inf"):
        return ""
    found = CELL.fullmatch(text.strip())
    if not found or found[2] not in UNITS:
        return None
    return float(found[1].replace(",", "")) * UNITS[found[2]]


def figure(alternative: str, caption: str, light: bytes, dark: bytes) -> str:
    """Return a figure for browsers that run no scripts, for light and for dark screens."""
    return f"<noscript>{picture(alternative, caption, light, dark)}</noscript>"


def picture(alternative: str, caption: str, light: bytes, dark: bytes) -> str:
    """Return a figure that no script draws, for light and for dark screens."""
    sources = [f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (light, dark)]
    image = f'<picture><source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">'
    # At this width letters of the PNG keep the size in which they were drawn (96 pixels per inch).
    width = round(int.from_bytes(light[16:20], "big") * 96 / DPI)
    image += f'<img alt="{escape(alternative)}" width="{width}" src="{sources[0]}"></picture>'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def commands(of_run: dict[Path, dict[str, list[str]]]) -> str:
    """Return the exact commands of each run, folded."""
    blocks = []
    for folder, steps in of_run.items():
        lines = "\n\n".join(escape(shlex.join(words)) for words in steps.values())
        blocks.append(f"<details><summary>{escape(folder.name)}</summary><pre>{lines}</pre></details>")
    return "\n".join(blocks)
