"""`fairseq-hash sample` and `fairseq-hash experts`: what they show is what the model does."""

import io
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pandas as pd
import pytest
import small_models
import torch
from called import call, refused
from html_page import contrast
from rich.console import Console
from small_models import checkpoint, loaded

import fairseq_hash
from fairseq_hash.api.routed_text import INK, Token, by_layer, color, page, print_text

TEXT = "word3 word1 word7 word0"
EOS = 2


def done(*arguments):
    status, out, err = call(*arguments)
    assert (status, err) == (0, ""), err
    return out


def shown(out):
    """Return tokens and experts of each layer that `--show-experts` printed."""
    layers, number = {}, None
    for line in out.splitlines():
        if found := re.fullmatch(r"layer (\d+), (\w+)", line):
            number = int(found[1]), found[2]
        elif number is not None and line:
            layers[number] = [tuple(word.rsplit("/", 1)) for word in line.split(" ")]
    return layers


@pytest.mark.parametrize("name", ["hash", "mixed", "several", "bigram", "insert"])
def test_sample_shows_text_and_experts(data, name, tmp_path):
    words = ("sample", checkpoint(data, name), TEXT, "--length", 5, "--seed", 4, "--show-experts")
    out = done(*words, "--html", tmp_path / "page.html")
    assert out.splitlines()[-1] == f"wrote {tmp_path / 'page.html'}"
    model = loaded(data, name)
    (sample,) = model.sample(TEXT, length=5, seed=4)
    assert out.splitlines()[0] == sample.text and sample.text.startswith(TEXT)
    routes = model.routes(sample.tokens)
    routes = routes[routes["position"] > 0]
    layers = shown(out.rsplit("wrote", 1)[0])
    assert set(layers) == set(zip(routes["layer"], routes["router"], strict=True))
    for (layer, _), tokens in layers.items():
        of_layer = routes[routes["layer"] == layer].groupby("position")
        assert [symbol for symbol, _ in tokens] == of_layer["token"].first().tolist()
        expected = ["+".join(map(str, group["expert"])) for _, group in of_layer]
        assert [experts for _, experts in tokens] == expected
    read = Page((tmp_path / "page.html").read_text())
    assert read.texts == [experts for tokens in layers.values() for _, experts in tokens]


class Page(HTMLParser):
    """What a page says: the numbers behind tokens, titles, what is given, keys of legends, tags and attributes."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.titles, self.given, self.tags, self.keys, self.styles = [], [], 0, [], [], []
        self._in_number = self._in_key = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self._in_number = tag == "sub"
        self._in_key = attributes.get("class") == "key"
        if attributes.get("class", "").startswith("token"):
            self.titles.append(attributes["title"])
            self.styles.append(attributes["style"])
            self.given += "given" in attributes["class"]

    def handle_data(self, text):
        if self._in_number:
            self.texts.append(text)
        if self._in_key:
            self.keys.append(text)

    def handle_endtag(self, tag):
        self._in_number = self._in_key = False


def test_the_page_is_self_contained_and_says_without_colour_what_colours_say(data):
    model = loaded(data, "several")
    routes = model.routes("word3 <unk> word1 word3")
    html = page("A <title>", "where & when", [(routes, 2)])
    read = Page(html)
    assert not re.search(r"https?:|url\(|@import", html)
    assert not {tag for tag, _ in read.tags} & {"script", "link", "img", "iframe"}
    assert ("html", {"lang": "en"}) in read.tags and "<title>A &lt;title&gt;</title>" in html
    assert "where &amp; when" in html and "&lt;unk&gt;<sub>" in html
    assert read.given == 2 * 2 and len(read.titles) == 2 * 4  # two layers
    experts = routes[(routes["position"] == 1) & (routes["layer"] == 0)]["expert"].tolist()
    assert read.titles[0] == f"word3: expert {experts[0]} (weight 0.5), expert {experts[1]} (weight 0.5)"
    assert read.texts[0] == f"{experts[0]}+{experts[1]}" and read.styles[0] == f"background:{color(experts[0])}"
    served = routes[(routes["position"] > 0) & (routes["layer"] == 0)]["expert"]
    keys = [f"expert {expert}" for expert in sorted(set(served))]
    assert read.keys == keys * 2
    assert f"{keys[0]}</span> {(served == min(served)).sum()}</li>" in html
    assert html.count("<tr>") == len(routes)  # of the table's body: for screen readers, and to copy


def test_ink_is_readable_on_every_colour():
    """WCAG 2.1: a contrast of 4.5 and more."""
    for expert in range(512):
        assert contrast(color(expert), INK) >= 4.5
    assert len({color(expert) for expert in range(64)}) == 64


def test_terminals_get_colours_and_numbers():
    tokens = [Token("▁do", (3,), (1.0,), True, False), Token("ne", (1, 2), (0.2, 0.8), False, False)]
    tokens += [Token("▁it", (0,), (1.0,), False, True), Token("▁", (1,), (1.0,), False, False)]
    out = io.StringIO()
    print_text(Console(file=out, force_terminal=True, color_system="truecolor", width=200), tokens)
    plain = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())
    assert plain == "do/3ne/1+2 it/0 ␣/1\n"
    red, green, blue = (int(color(2)[at : at + 2], 16) for at in (1, 3, 5))
    assert f"48;2;{red};{green};{blue}mne" in out.getvalue()  # of the heavier one
    assert tokens[2].description == "▁it: expert 0 (weight 1), dropped: over capacity"


def test_samples_of_several_kinds(data):
    words = ("sample", checkpoint(data, "switch"), TEXT, "--length", 4)
    assert done(*words) == done(*words, "--seed", 1) != done(*words, "--seed", 2)
    assert len(done(*words, "--number", 3).split("\n\n")) == 3
    assert done(*words, "--beam", 1) == done(*words, "--top-k", 1) == done(*words, "--beam", 1, "--seed", 9)
    assert done(*words, "--map-experts") == done(*words)
    assert done("sample", checkpoint(data, "none"), "--length", 2).strip()
    model = loaded(data, "switch")
    (sample,) = model.sample(TEXT, length=4, temperature=0.5, top_p=0.8)
    assert done(*words, "--temperature", 0.5, "--top-p", 0.8).strip() == sample.text


def test_by_layer_marks_what_was_given(data):
    routes = loaded(data, "mixed").routes(TEXT)
    ((number, router, tokens), (_, other, _)) = by_layer(routes, 3)
    assert (number, router, other) == (0, "hash", "switch")
    assert [token.given for token in tokens] == [True, True, True, False]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("missing.pt", TEXT), "missing.pt does not exist"),
        (("{hash}", ""), "TEXT is empty; give some words, or leave it out to begin a line"),
        (("{hash}", " \n"), "TEXT is empty"),
        (("{hash}", "word1\nword2"), "several lines"),
        (("{hash}", TEXT, "--length", 0), "--length 0 is out of range; give 1 or more"),
        (("{hash}", TEXT, "--length", 99), "there is room for 11 more, not 99; give a shorter text or --length"),
        (("{hash}", "word1 " * 30), "the text has 30 tokens, but the model reads 15 at once; give a shorter text"),
        (("{hash}", TEXT, "--top-k", 0), "--top-k 0 is out of range"),
        (("{hash}", TEXT, "--top-p", 1.5), "--top-p 1.5 is out of range"),
        (("{hash}", TEXT, "--temperature", -1), "--temperature -1.0 is out of range"),
        (("{hash}", TEXT, "--html", "no/page.html"), "--html no/page.html cannot be written; give a file in a folder"),
        (("{hash}", TEXT, "--data", "nowhere"), "nowhere/dict.txt"),
        (("{hash}", TEXT, "--device", "abacus"), "device abacus is unknown; give cpu, cuda or cuda:N"),
        (("{none}", TEXT, "--show-experts"), "has no experts to show; leave out --show-experts and --html"),
    ],
)
def test_bad_samples_are_one_line(data, words, line):
    paths = {name: checkpoint(data, name) for name in ("hash", "none")}
    assert line in refused("sample", *(str(word).format(**paths) for word in words))


def text_file(folder, lines):
    (folder / "text.txt").write_text("".join(f"{line}\n" for line in lines))
    return folder / "text.txt"


@pytest.mark.parametrize("name", ["mixed", "history", "multi"])
def test_experts_of_a_text_are_its_routes(data, name, tmp_path):
    """Of a text longer than a block: each block of what is read is routed alone, and no token is left out."""
    lines = (data.parent / "valid.txt").read_text().splitlines()[:6]
    path = text_file(tmp_path, lines)
    table = pd.read_csv(io.StringIO(done("experts", checkpoint(data, name), path)), sep="\t", keep_default_na=False)
    model = loaded(data, name)
    read = [EOS, *(token for line in lines for token in [*model.tokenize(line).tolist(), EOS])]
    assert len(read) > 32
    assert table.groupby("position")["token"].first().tolist() == [model.dictionary[token] for token in read]
    for at in range(0, len(read), 16):
        block = read[at : at + 16]
        expected = model.routes_read(torch.tensor(block))["expert"].tolist()
        assert table[table["position"].between(at, at + 15)]["expert"].tolist() == expected
    written = done("experts", checkpoint(data, name), path, "--out", tmp_path / "routes.csv")
    assert written == f"wrote {tmp_path / 'routes.csv'}\n"
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "routes.csv", keep_default_na=False), table)
    short = pd.read_csv(io.StringIO(done("experts", checkpoint(data, name), path, "--tokens-per-sample", 5)), sep="\t")
    assert len(short) == len(table)

    summary = pd.read_csv(io.StringIO(done("experts", checkpoint(data, name), path, "--summary")), sep="\t")
    for layer in (0, 1):
        of_layer = table[table["layer"] == layer]
        counts = summary[summary["layer"] == layer].set_index("expert")["tokens"].to_dict()
        assert counts == {expert: int((of_layer["expert"] == expert).sum()) for expert in range(4)}
        assert summary[summary["layer"] == layer]["share"].sum() == pytest.approx(1, abs=1e-5)
        busiest = summary[summary["layer"] == layer].sort_values("tokens").iloc[-1]
        served = of_layer[of_layer["expert"] == busiest["expert"]]["token"].value_counts()
        assert served[busiest["examples"].split(" ")[0]] == served.max()


def test_experts_reads_standard_input(data, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(f"{TEXT}\n".encode())))
    words = ("experts", checkpoint(data, "hash"))
    assert done(*words, "-") == done(*words, text_file(tmp_path, [TEXT]))


def test_a_reader_that_leaves_is_no_error(data, tmp_path):
    path = text_file(tmp_path, (data.parent / "train.txt").read_text().splitlines()[:400])
    program = "import sys; from fairseq_hash.cli import main; sys.exit(main(sys.argv[1:]))"
    command = shlex.join([sys.executable, "-c", program, "experts", str(checkpoint(data, "hash")), str(path)])
    piped = ["bash", "-o", "pipefail", "-c", f"{command} | head -n 1"]
    ran = subprocess.run(piped, capture_output=True, text=True, timeout=300)
    assert ran.stdout.startswith("position\ttoken") and (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("missing.pt", "{text}"), "missing.pt does not exist"),
        (
            ("{hash}", "nothing.txt"),
            "nothing.txt cannot be read (No such file or directory); give a file of text, or -",
        ),
        (("{hash}", "{empty}"), "is empty; give some text"),
        (("{hash}", "{latin}"), "is not UTF-8 (byte 1); give a file of text"),
        (("{hash}", "{text}", "--tokens-per-sample", 0), "--tokens-per-sample 0 is out of range; give 1 to 16"),
        (("{hash}", "{text}", "--tokens-per-sample", 17), "--tokens-per-sample 17 is out of range; give 1 to 16"),
        (("{hash}", "{text}", "--out", "{text}"), "has an unknown ending; give a name that ends in .tsv or .csv"),
        (("{hash}", "{text}", "--out", "{there}"), "exists; give another file, or add --overwrite to replace it"),
        (("{hash}", "{text}", "--out", "no/where.tsv"), "the folder no does not exist; make it first"),
        (("{none}", "{text}"), "has no experts; give a checkpoint of a model with --sparse-layers"),
    ],
)
def test_bad_texts_are_one_line(data, words, line, tmp_path):
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "latin").write_bytes(b"a\xe9b")
    (tmp_path / "there.tsv").write_text("kept")
    names = {"text": text_file(tmp_path, [TEXT]), "there": tmp_path / "there.tsv"}
    names |= {name: checkpoint(data, name) for name in ("hash", "none")}
    names |= {name: tmp_path / name for name in ("empty", "latin")}
    assert line in refused("experts", *(str(word).format(**names) for word in words))
    assert (tmp_path / "there.tsv").read_text() == "kept"


def test_pieces_are_read_and_put_together(data):
    """By the SentencePiece model beside the dictionary, with the bytes of rare characters."""
    path, folder = small_models.checkpoint_of_pieces(data)
    model = fairseq_hash.load(path)
    text = "word3 a naïve café ☃\nword1"
    assert model.detokenize(model.tokenize(text)) == text
    assert model.dictionary.unk() not in model.tokenize(text).tolist()
    assert "<0xE2>" in model.routes(text)["token"].tolist()
    assert done("sample", path, "a naïve café", "--length", 3).startswith("a naïve café")
    (folder / "sentencepiece.model").rename(folder.parent / "moved.model")
    try:
        assert "no sentencepiece.model beside it; give the SentencePiece model" in refused("sample", path, "word3")
        assert done("sample", path, "word3", "--length", 1, "--sentencepiece", folder.parent / "moved.model")
        assert len(fairseq_hash.load(path).logits([5, 6])) == 3
    finally:
        (folder.parent / "moved.model").rename(folder / "sentencepiece.model")
