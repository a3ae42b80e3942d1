"""Draw the picture of README: how a hash layer routes, and what that gave in the main study.

    python scripts/picture.py            # writes docs/pictures/overview.svg

The numbers are read from the study's report; the words and their experts on the left are an example.
"""

import re
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/studies/main/results.md"
PICTURE = ROOT / "docs/pictures/overview.svg"
# Equal work a token, 16 experts; and the names in the report.
SHOWN = {
    "Dense": "Dense",
    "BASE": "BASE, greedy evaluation",
    "Switch": "Switch, no capacity limit",
    "Hash": "Hash, balanced",
}
# N-gram models: their names in the report, the words beside the line, and where those end or begin.
COUNTS = {
    "Kneser-Ney, 4 tokens": ("counts of 4 tokens", "end", 8),
    "Kneser-Ney, 3 tokens (trigram)": ("3 tokens", "start", -6),
}
UNIT = 12  # pixels of a perplexity of 1
EXAMPLE = (("the", 2), ("old", 0), ("man", 3), ("sat", 2))
STYLE = """
svg { --paper: #ffffff; --ink: #1c2024; --soft: #5b6570; --line: #d5d9de; --hash: #0072b2; --other: #8a94a0;
  font: 15px system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif }
@media (prefers-color-scheme: dark) {
  svg { --paper: #15181c; --ink: #e4e7eb; --soft: #a4adb8; --line: #3a4149; --hash: #56b4e9; --other: #7d8794 } }
.card { fill: var(--paper); stroke: var(--line) } text { fill: var(--ink) }
.soft { fill: var(--soft); font-size: 13px } .title { font-size: 16px; font-weight: 600 } .strong { font-weight: 600 }
.box { fill: none; stroke: var(--soft); stroke-width: 1.3 } .way { fill: none; stroke: var(--hash); stroke-width: 2 }
.used { fill: var(--hash); fill-opacity: .16; stroke: var(--hash) }
.hash { fill: var(--hash) } .other { fill: var(--other) } .spread { stroke: var(--ink); stroke-width: 1.6 }
.counts { stroke: var(--ink); stroke-width: 1.3; stroke-dasharray: 4 3 }
"""


def measured() -> dict[str, tuple[str, str, str]]:
    """Return each shown model's test perplexity: mean over the seeds and ends of its interval, as they are written."""
    number = r"([\d.]+)"
    report = RESULTS.read_text(encoding="utf-8")
    rows = re.findall(rf"^\| ([^|]+?) \| {number} \({number} to {number}\) \|", report, re.MULTILINE)
    found: dict[str, tuple[str, str, str]] = {}
    for name, *figures in rows:
        found.setdefault(name, tuple(figures))
    return {name: found[in_report] for name, in_report in SHOWN.items()}


def counted() -> dict[str, str]:
    """Return the test perplexity of the n-gram models by their names in the report, as it is written."""
    report = RESULTS.read_text(encoding="utf-8")
    rows = {name: rf"^\| {re.escape(name)} \| ([\d.]+) \|" for name in COUNTS}
    return {name: re.search(row, report, re.MULTILINE)[1] for name, row in rows.items()}


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Return words at a place."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, kind: str = "box") -> str:
    """Return a frame of 30 pixels' height."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="30" rx="5" class="{kind}"/>'


def routing() -> str:
    """Return the left half: tokens, the table, experts, and the ways between them."""
    parts = [text(24, 36, "A fixed table says which expert serves a token", "title")]
    for x, heading in ((24, "token"), (142, "hash table"), (332, "expert (an FFN)")):
        parts.append(text(x, 68, heading, "soft"))
    used = {expert for _, expert in EXAMPLE}
    for place, (word, expert) in enumerate(EXAMPLE):
        y, to = 80 + 46 * place, 80 + 46 * expert
        parts += [box(24, y, 78), text(63, y + 20, word, "", "middle"), f'<path class="way" d="M102 {y + 15}H142"/>']
        parts += [box(142, y, 104), text(194, y + 20, f"{word} → {expert}", "strong", "middle")]
        parts.append(f'<path class="way" d="M246 {y + 15}C290 {y + 15} 290 {to + 15} 332 {to + 15}"/>')
    for expert in range(4):
        kind = "box used" if expert in used else "box"
        parts += [box(332, 80 + 46 * expert, 96, kind), text(380, 100 + 46 * expert, f"expert {expert}", "", "middle")]
    parts.append(text(24, 288, "Known before the first layer runs: no router to train,", "soft"))
    return "".join([*parts, text(24, 307, "no balancing loss, and each token costs one expert.", "soft")])


def results() -> str:
    """Return the right half: a bar from 0 for each model, with its interval."""
    parts = [text(484, 36, "Test perplexity at equal work (lower is better)", "title")]
    for place, (name, (mean, low, high)) in enumerate(measured().items()):
        y, end = 80 + 46 * place, 556 + UNIT * float(mean)
        kind = "hash" if name == "Hash" else "other"
        parts.append(text(546, y + 20, name, "strong" if name == "Hash" else "", "end"))
        parts.append(f'<rect x="556" y="{y}" width="{end - 556:.1f}" height="30" class="{kind}"/>')
        left, right = (f"{556 + UNIT * float(value):.1f}" for value in (low, high))
        parts.append(f'<path class="spread" d="M{left} {y + 15}H{right}M{left} {y + 9}v12M{right} {y + 9}v12"/>')
        parts.append(text(728, y + 20, f"{mean} ({low} to {high})", "strong" if name == "Hash" else ""))
    for name, value in counted().items():
        words, anchor, beside = COUNTS[name]
        x = 556 + UNIT * float(value)
        parts.append(f'<path class="counts" d="M{x:.1f} 74V262"/>')
        parts.append(text(x + beside, 68, f"{words} {value}", "soft", anchor))
    parts.append(text(484, 288, "English novels; 2 layers, one with 16 experts; 2.1 M tokens;", "soft"))
    return "".join([*parts, text(484, 307, "5 seeds, 95 % intervals, tuned learning rates; on a CPU.", "soft")])


def picture() -> str:
    """Return the whole picture as SVG; text in it stands for what it shows."""
    values = ", ".join(f"{name} {mean}" for name, (mean, _, _) in measured().items())
    counts = ", ".join(f"{COUNTS[name][0]} {value}" for name, value in counted().items())
    alternative = (
        "Each token's expert is looked up in a fixed table. Test perplexity at equal work a token: "
        f"{values}; of counted n-grams: {counts}."
    )
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 328" width="920" height="328" role="img" '
    head += f'aria-label="{alternative}"><title>{alternative}</title><style>{STYLE}</style>'
    return f'{head}<rect class="card" x="1" y="1" width="918" height="326" rx="10"/>{routing()}{results()}</svg>\n'


if __name__ == "__main__":
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(picture(), encoding="utf-8")
    print(f"wrote {PICTURE} ({PICTURE.stat().st_size:,} bytes)")
