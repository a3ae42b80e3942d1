"""A page as its reader gets it, taken apart."""

import json
from html.parser import HTMLParser


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
