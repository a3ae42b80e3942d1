"""Draw how long ranks wait for the fullest one: contiguous experts, placed ones, and placed ones with replicas.

    python scripts/picture_ranks.py            # writes docs/pictures/even_ranks.svg

The numbers are read from the benchmark's results (`benchmarks/even_ranks.py`).
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/even_ranks.md"
PICTURE = ROOT / "docs/pictures/even_ranks.svg"
TOKENS = "4,096"  # of a rank's batch
# Table and ranks, and the columns of the straggler factors in the results.
SHOWN = (("balanced", "16"), ("balanced", "64"), ("random", "16"), ("random", "64"))
BARS = {"contiguous": (4, "other"), "placed": (6, "placed"), "with replicas": (8, "copies")}
LEFT, UNIT, THICK = 300, 120, 20  # pixels: where bars begin, of a factor of 1, of a bar
STYLE = """
svg { --paper: #ffffff; --ink: #1c2024; --soft: #5b6570; --line: #d5d9de; --a: #8a94a0; --b: #d98a3d; --c: #0072b2;
  font: 14px system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif }
@media (prefers-color-scheme: dark) {
  svg { --paper: #15181c; --ink: #e4e7eb; --soft: #a4adb8; --line: #3a4149; --a: #7d8794; --b: #e0a569; --c: #56b4e9 } }
.card { fill: var(--paper); stroke: var(--line) } text { fill: var(--ink) } .soft { fill: var(--soft); font-size: 13px }
.title { font-size: 16px; font-weight: 600 } .other { fill: var(--a) } .placed { fill: var(--b) }
.copies { fill: var(--c) } .even { stroke: var(--ink); stroke-width: 1.3; stroke-dasharray: 4 3 }
"""


def measured() -> dict[tuple[str, str], dict[str, str]]:
    """Return the mean straggler factors as they are written: of a table and a number of ranks, by the placement."""
    found = {}
    for line in RESULTS.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[2] == TOKENS:
            found[cells[0], cells[1]] = {name: cells[column] for name, (column, _) in BARS.items()}
    return {about: found[about] for about in SHOWN}


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Return words at a place."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def picture() -> str:
    """Return the whole picture as SVG; text in it stands for what it shows."""
    parts, y = [text(24, 34, "Rows of the fullest rank, over the mean of its group", "title")], 62
    parts.append(text(LEFT + UNIT, 56, "1: all ranks are even", "soft", "middle"))
    said = []
    for (table, ranks), factors in measured().items():
        parts.append(text(24, y + 17, f"{table} table, {ranks} ranks", "soft"))
        for name, (_, kind) in BARS.items():
            end = LEFT + UNIT * float(factors[name])
            parts.append(text(LEFT - 8, y + 15, name, "", "end"))
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{end - LEFT:.1f}" height="{THICK}" class="{kind}"/>')
            parts.append(text(end + 8, y + 15, factors[name]))
            y += THICK + 4
        said.append(f"{table} table, {ranks} ranks: {', '.join(f'{name} {value}' for name, value in factors.items())}")
        y += 14
    parts.append(f'<path class="even" d="M{LEFT + UNIT} 62V{y - 14}"/>')
    about = f"128 experts; held-out novels, {TOKENS} tokens a rank; as many replicas as ranks."
    parts.append(text(24, y + 12, about, "soft"))
    height = y + 30
    alternative = f"Rows of the fullest rank over the mean of its group. {'; '.join(said)}."
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {height}" width="900" height="{height}" '
    head += f'role="img" aria-label="{alternative}"><title>{alternative}</title><style>{STYLE}</style>'
    return f'{head}<rect class="card" x="1" y="1" width="898" height="{height - 2}" rx="10"/>{"".join(parts)}</svg>\n'


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(f"wrote {PICTURE} ({PICTURE.stat().st_size:,} bytes)")
