"""A text whose tokens show their experts: in colour on terminals, and as an HTML page.

Colour never carries information alone: each token has the numbers of its experts beside it. With many experts, colours
repeat.
"""

import colorsys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd

from fairseq_hash.hashing.words import BEGIN

INK = "#1c2024"  # text on every expert's colour
GOLDEN = 0.618033988749895  # experts with neighbouring numbers get distant hues

STYLE = """
:root { --paper: #ffffff; --ink: #1c2024; --soft: #5b6570; --line: #d5d9de }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e4e7eb; --soft: #a4adb8; --line: #3a4149 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; color-scheme: light dark }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .25rem } h3 { font-size: 1rem }
p { overflow-wrap: anywhere }
.soft { color: var(--soft) }
.text { line-height: 2.1 }
.token, .key { padding: .1rem .2rem; border-radius: .2rem; color: #1c2024 }
.given { text-decoration: underline; text-underline-offset: .2em }
sub { font-size: .68em; font-variant-numeric: tabular-nums }
.legend { display: flex; flex-wrap: wrap; gap: .25rem .75rem; margin: 0; padding: 0; list-style: none }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid var(--line) }
summary { cursor: pointer }
"""


@dataclass(frozen=True)
class Token:
    """A token in one layer: its experts in the order of their choices, and the weights of their outputs.

    `given`: whether it belongs to the given text; `dropped`: whether its experts were full.
    """

    symbol: str
    experts: tuple[int, ...]
    weights: tuple[float, ...]
    given: bool
    dropped: bool

    @property
    def word(self) -> str:
        """The symbol without SentencePiece's mark of a word's beginning; a mark alone is shown."""
        return self.symbol.replace(BEGIN, " ").strip() or "␣"

    @property
    def label(self) -> str:
        """Numbers of the experts."""
        return "+".join(map(str, self.experts))

    @property
    def main(self) -> int:
        """The expert with the largest weight, which gives the colour."""
        return self.experts[max(range(len(self.weights)), key=self.weights.__getitem__)]

    @property
    def description(self) -> str:
        """Experts and weights in words."""
        served = ", ".join(
            f"expert {expert} (weight {weight:.3g})" for expert, weight in zip(self.experts, self.weights, strict=True)
        )
        return f"{self.symbol}: {served}{', dropped: over capacity' if self.dropped else ''}"


def color(expert: int) -> str:
    """Return the light colour of an expert, `#rrggbb`."""
    rgb = colorsys.hls_to_rgb((expert * GOLDEN) % 1, 0.82 - 0.1 * (expert // 8 % 2), 0.75)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def by_layer(routes: pd.DataFrame, given: int) -> Iterator[tuple[int, str, list[Token]]]:
    """Yield number, router and tokens of each sparse layer. The first `given` tokens after the start are the user's.

    The start symbol is left out.
    """
    for (layer, router), of_layer in routes.groupby(["layer", "router"]):
        tokens = []
        for position, choices in of_layer[of_layer["position"] > 0].groupby("position"):
            experts, weights = tuple(choices["expert"].tolist()), tuple(choices["weight"].tolist())
            dropped = bool(choices["dropped"].all())
            tokens.append(Token(choices["token"].iloc[0], experts, weights, position <= given, dropped))
        yield layer, router, tokens


def spaced(tokens: Sequence[Token]) -> Iterator[tuple[str, Token]]:
    """Yield each token with the space before it. There is no space between the pieces of a word."""
    are_pieces = any(token.symbol.startswith(BEGIN) for token in tokens)
    for place, token in enumerate(tokens):
        begins = not are_pieces or token.symbol.startswith(BEGIN)
        yield " " if place and begins else "", token


def print_text(console: Any, tokens: Sequence[Token]) -> None:
    """Print tokens on their expert's colour, followed by the expert's number. The given text is underlined."""
    from rich.text import Text

    line = Text()
    for space, token in spaced(tokens):
        line.append(space)
        line.append(token.word, f"{INK} on {color(token.main)}" + (" underline" if token.given else ""))
        line.append(f"/{token.label}", "dim")
    console.print(line)


def page(title: str, subtitle: str, samples: Sequence[tuple[pd.DataFrame, int]]) -> str:
    """Return a self-contained page of samples. Each sample has its routes and the number of given tokens."""
    body = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(subtitle)}</p>']
    body.append(
        "<p>Each token has the colour of its expert (if there are several, of the one with the largest weight), "
        "followed by their numbers. The given text is underlined.</p>"
    )
    for number, (routes, given) in enumerate(samples, 1):
        body.append(f"<section><h2>Sample {number}</h2>")
        for layer, router, tokens in by_layer(routes, given):
            body.append(f"<h3>Layer {layer}, {escape(router)}</h3>{_legend(tokens)}{_text(tokens)}")
        body.append(f"{_table(routes)}</section>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body><main>\n'
        + "\n".join(body)
        + "\n</main></body>\n</html>\n"
    )


def _text(tokens: Sequence[Token]) -> str:
    spans = [
        f'{space}<span class="token{" given" if token.given else ""}" style="background:{color(token.main)}" '
        f'title="{escape(token.description)}">{escape(token.word)}<sub>{token.label}</sub></span>'
        for space, token in spaced(tokens)
    ]
    return f'<p class="text">{"".join(spans)}</p>'


def _legend(tokens: Sequence[Token]) -> str:
    served = Counter(expert for token in tokens for expert in token.experts)
    keys = [
        f'<li><span class="key" style="background:{color(expert)}">expert {expert}</span> {count}</li>'
        for expert, count in sorted(served.items())
    ]
    return f'<ul class="legend" aria-label="Experts, and how many tokens each serves">{"".join(keys)}</ul>'


def _table(routes: pd.DataFrame) -> str:
    html = routes.to_html(index=False, border=0, escape=True, float_format="{:.3g}".format)
    return f'<details><summary>As a table</summary><div class="wide">{html}</div></details>'
