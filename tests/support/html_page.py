"""A page as its reader gets it, taken apart; and the contrast of colours."""

import json
from html.parser import HTMLParser


def contrast(one, other):
    """Return WCAG 2's contrast of two colours such as #1c2024."""

    def luminance(colour):
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


class Page(HTMLParser):
    """What a page holds: tables as lists of rows of text, sources and links, tags, text. Tags must be balanced."""

    EMPTY = ("meta", "img", "source", "br", "hr", "link", "input")

    def __init__(self):
        super().__init__()
        self.tables, self.sources, self.tags, self.open, self.text, self.charts = [], [], [], [], "", []

    @classmethod
    def of(cls, path):
        parser = cls()
        parser.feed(path.read_text(encoding="utf-8"))
        parser.close()
        assert parser.open == []
        return parser

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if ("http-equiv", "Content-Security-Policy") in attributes:
            self.policy = dict(attributes)["content"]
        if tag not in self.EMPTY:
            self.open.append(tag)
        self.sources += [v for k, v in attributes if k in ("src", "srcset", "href", "data", "action", "poster")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            if data.startswith("{"):
                self.charts.append(json.loads(data))
            return
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
