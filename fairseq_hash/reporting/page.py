"""The page of a report: one HTML file with everything in it, for light and dark screens."""

import base64
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path

import pandas as pd

from fairseq_hash.reporting.plots import DPI

STYLE = """
:root { --paper: #ffffff; --ink: #1c2024; --soft: #5b6570; --line: #d5d9de; --band: #f4f6f8; --link: #0072b2 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e4e7eb; --soft: #a4adb8; --line: #3a4149; --band: #1d2126; --link: #56b4e9 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 74rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; color-scheme: light dark }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem }
p, li { max-width: 46rem }
.soft, figcaption { color: var(--soft); font-size: .9rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .7rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: bottom }
th { font-weight: 600; line-height: 1.25 } td { white-space: nowrap }
th:first-child, td:first-child, .words td, .words th { text-align: left }
.words td { vertical-align: top; white-space: normal; overflow-wrap: anywhere }
tbody tr:hover { background: var(--band) }
figure { margin: 1rem 0 } img { max-width: 100%; height: auto; display: block }
pre, code { font: .82rem/1.5 ui-monospace, "SF Mono", Consolas, "DejaVu Sans Mono", monospace }
pre { background: var(--band); padding: .75rem 1rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere }
summary { cursor: pointer; color: var(--link) }
"""


def render(title: str, subtitle: str, parts: Sequence[str]) -> str:
    """Return the whole page: a heading and the parts, which are HTML."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    body = f'<h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p>' + "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


def section(heading: str, *parts: str) -> str:
    """Return a heading and what stands under it."""
    return f"<h2>{escape(heading)}</h2>\n" + "\n".join(parts)


def paragraphs(text: str) -> str:
    """Return plain text as HTML; an empty line starts a new paragraph."""
    return "\n".join(f"<p>{escape(' '.join(part.split()))}</p>" for part in text.split("\n\n") if part.strip())


def table(content: pd.DataFrame, words: bool = False) -> str:
    """Return a table; `words` sets every column to the left."""
    return f'<div class="wide{" words" if words else ""}">{content.to_html(index=False, border=0, escape=True)}</div>'


def figure(alternative: str, caption: str, light: bytes, dark: bytes) -> str:
    """Return a figure that follows the reader's light or dark screen."""
    sources = [f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (light, dark)]
    picture = f'<picture><source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">'
    picture += f'<img alt="{escape(alternative)}" width="{_width(light)}" src="{sources[0]}"></picture>'
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def _width(png: bytes) -> int:
    """Return the width to show a PNG at, so that letters have the size they were drawn in (96 pixels an inch)."""
    return round(int.from_bytes(png[16:20], "big") * 96 / DPI)


def commands(of_run: dict[Path, dict[str, list[str]]]) -> str:
    """Return the exact commands of each run, folded."""
    blocks = []
    for folder, steps in of_run.items():
        lines = "\n\n".join(escape(shlex.join(words)) for words in steps.values())
        blocks.append(f"<details><summary>{escape(folder.name)}</summary><pre>{lines}</pre></details>")
    return "\n".join(blocks)
