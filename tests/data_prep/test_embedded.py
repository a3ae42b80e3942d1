"""The embedded corpus: hand-worked paragraphs, the split, and one whole build."""

import json
import os
import random
import subprocess
import sys
import sysconfig
import tokenize
from pathlib import Path

import pytest

from data_prep import embedded
from fairseq_hash.core.errors import UserError
from fairseq_hash.provenance import sha256_of_file

DOCUMENTED = '''
"""What this module is for.

It has a second paragraph
on two lines.
"""

class Outer(Base, metaclass=Meta):
    """The outer one of two classes."""

    class Inner:
        """The inner one of them."""

        async def wait(self, seconds: float = 1.0, *names):
            """Wait for a while."""
            def local(x):
                """Do nothing that matters."""

def undocumented(a, /, *, b):
    return "stop"
'''

COMMENTED = """\
#!/usr/bin/env python3
# -*- coding: utf-8 -*-

# One paragraph over
# two lines.
#
# Another one after it.
value = 1  # the first half of
           # a trailing comment
# and this is another
other = "# this one is a string" ; rest = '''
# and so is this, it is printed
'''
# old = compute(value)
# if value:
#     compute(other)
##################
# A boxed comment here
##################

# Compute all that there is.
@cached
def compute(x):
    # pragma: no cover
    return x
"""

MESSAGES = """
raise ValueError("that is not a number: %s" % text)
raise OSError(f"no room for {name!r} on this disk")
raise errors.Problem("nobody has ever seen that".format(x))
parser.add_argument("--depth", help="how many folders to go down")
"""


def test_docstrings_follow_their_signatures():
    assert embedded.paragraphs_of_source(DOCUMENTED) == [
        "What this module is for.",
        "It has a second paragraph on two lines.",
        "class Outer(Base): The outer one of two classes.",
        "class Outer.Inner: The inner one of them.",
        "Outer.Inner.wait(self, seconds: float=1.0, *names): Wait for a while.",
        "local(x): Do nothing that matters.",
    ]


def test_comments_are_joined_and_those_that_are_no_prose_left_out():
    assert embedded.paragraphs_of_source(COMMENTED) == [
        "One paragraph over two lines.",
        "Another one after it.",
        "the first half of a trailing comment",
        "and this is another",
        "# this one is a string",
        "# and so is this, it is printed",
        "A boxed comment here",
        "compute(x): Compute all that there is.",
    ]


def test_messages_follow_their_exceptions():
    assert embedded.paragraphs_of_source(MESSAGES) == [
        "ValueError: that is not a number: %s",
        "OSError: no room for {name} on this disk",
        "nobody has ever seen that",
        "how many folders to go down",
    ]


CLEANING = {
    "white space": ("  Some  text\n\twith\ftabs.  \n\n\n  And more text.", ["Some text with tabs.", "And more text."]),
    "a doctest": ("An example:\n\n>>> f(1)\nshown are these\n\nText goes on.", ["Text goes on."]),
    "a doctest in a paragraph": ("It is shown here:\n    >>> f(1)\n    that is shown", ["It is shown here:"]),
    "a literal block": (
        "Use it like this::\n\n    not a bit of text\n\n    nor this one\n\nText goes on.",
        ["Use it like this:", "Text goes on."],
    ),
    "code": (
        "Before it there is text.\nfor x in range(3):\n    total += x\n    print(total)\n@decorator\nimport os\n"
        "from os import path\nreturn f(x)\nx[0] = 5 is set\nif not x:\nclass Name(Base):\nAfter it there is more.",
        ["Before it there is text.", "After it there is more."],
    ),
    "text that begins as code does": (
        "for example, keep this.\n\nif the list is empty:\n\nreturn the old value\n\nwith some luck",
        ["for example, keep this.", "if the list is empty:", "return the old value", "with some luck"],
    ),
    "a grammar": ('del_stmt ::= "del" target_list\nparameter   ::=  identifier\n\nThis is text.', ["This is text."]),
    "a table": (
        "+-----+-------+\n| one | is a  |\n| big | table |\n+-----+-------+\nname   type   its use\n\nThis is text.",
        ["This is text."],
    ),
    "a heading": ("The title of it\n---------------\nThis is text.\n", ["The title of it", "This is text."]),
    "a separator with text": ("----- part one of it -----", ["part one of it"]),
    "items": (
        "There are three kinds:\n- the first kind\n  of them\n- the second kind\n  2) the third kind\n",
        ["There are three kinds:", "the first kind of them", "the second kind", "the third kind"],
    ),
    "named items": (
        ":param name: what to call it\n:returns: nothing of note\nwidth -- how wide it is\n   in all\nheight: how high",
        ["name: what to call it", "nothing of note", "width -- how wide it is in all", "height: how high"],
    ),
    "dedents": (
        "   First lines may be\nindented more.\n\n   It says\n   this much.\nAnd then that.",
        ["First lines may be indented more.", "It says this much.", "And then that."],
    ),
    "signatures": (
        "str.lower()\nstr.casefold(x) -> str\n\n   Return a copy of it.\n\nstr.upper()\n\nThis is something else.",
        ["str.lower() str.casefold(x) -> str: Return a copy of it.", "This is something else."],
    ),
    "mark-up": (
        "The :class:`~a.Name` and ``more`` of `that` or `this' is *very* **much so**; *args and **kwargs are not.",
        ["The a.Name and more of that or this is very much so; *args and **kwargs are not."],
    ),
    "typography": ("“It’s” – well… a\u00a0test", ['"It\'s" - well... a test']),
    "other letters": ("Written by Martin von Löwis.\n\nThis is text.", ["This is text."]),
    "a licence": ("Copyright (c) by somebody.\n\nLicensed to you by somebody.\n\nThis is text.", ["This is text."]),
    "a divided word": ("It is a built-\nin name - like\nmost of them.", ["It is a built-in name - like most of them."]),
    "few words": ("Too short\n\nLong enough now\n\n%s = %r (%d)", ["Long enough now"]),
    "symbols": ("the sum <b> [c] (e|f) is\n\nthe x-> h! <b>\n\nA.b and c_d() call %s", ["A.b and c_d() call %s"]),
    "nothing": ("", []),
}  # fmt: skip


@pytest.mark.parametrize("case", CLEANING)
def test_cleaning(case):
    text, paragraphs = CLEANING[case]
    assert embedded.paragraphs_of_text(text) == paragraphs


def test_a_heading_goes_before_the_first_paragraph_that_is_kept():
    paragraphs = embedded.paragraphs_of_text(">>> f(1)\n2\n\nReturn one more.\n\nIt is fast.", "f(x)")
    assert paragraphs == ["f(x): Return one more.", "It is fast."]


@pytest.mark.parametrize("module", ["argparse", "difflib", "re/_parser", "sre_parse", "typing", "email/message"])
def test_comments_are_those_of_tokenize(module):
    path = Path(sysconfig.get_path("stdlib")) / f"{module}.py"
    if not path.is_file():
        pytest.skip("not in this version of Python")
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
    with tokenize.open(path) as file:
        comments = embedded._comments(file.read())
    assert [line.strip() for *_, lines in comments for line in lines] == [t.string.lstrip("#").strip() for t in tokens]
    assert {(line, column) for line, column, _ in comments} <= {token.start for token in tokens}


def test_the_split_is_a_function_of_the_family_name():
    """The names are fixed for good: another split is another corpus."""
    assert [embedded.split_of(name) for name in ("json.decoder", "timeit", "help:with")] == ["valid", "test", "train"]
    assert all(embedded.split_of(name) == embedded.split_of(other) for name, other in embedded.SAME_AS.items())
    assert {embedded.split_of(name) for name in embedded.TRAINED} == {"train"}
    assert embedded.split_of("email.header") == embedded.split_of("xml.dom.minidom") == "train"
    assert embedded.split_of("_json") == embedded.split_of("json")


def test_the_held_out_shares_are_what_is_asked_for():
    """Of 10,000 names each of valid and test gets 1,050, standard deviation 31; five of them are 155."""
    splits = [embedded.split_of(f"package{number}.module") for number in range(10_000)]
    assert splits.count("valid") == pytest.approx(1050, abs=155)
    assert splits.count("test") == pytest.approx(1050, abs=155)


def test_source_files_leave_out_what_is_not_the_same_everywhere(tmp_path):
    kept = ["abc", "email.__init__", "email.mime.text", "json.tool"]
    left_out = ["tkinter.ttk", "unittest.test.support", "ctypes.util", "site", "no_such_module", "site-packages.abc"]
    for name in random.Random(0).sample(kept + left_out, len(kept + left_out)):
        path = tmp_path / (name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert list(embedded.source_files(tmp_path)) == ["abc", "email", "email.mime.text", "json.tool"]


@pytest.fixture
def two_modules(monkeypatch):
    """A library of two modules, one trained on and one held out, that share a paragraph."""
    modules = [
        ("email", ["Only in the first.", "Common to both."]),
        ("json", ["Common to both.", "Only in the other."]),
    ]
    monkeypatch.setattr(embedded, "_paragraphs_by_module", lambda on_progress: modules)
    monkeypatch.setattr(embedded, "MINIMUM_WORDS", 11)


def test_a_paragraph_stays_where_it_occurs_first(two_modules, tmp_path):
    paths = embedded.write_embedded_corpus(tmp_path / "new folder")
    texts = [b"Only in the first.\nCommon to both.\n", b"Only in the other.\n", b""]
    assert [paths[split].read_bytes() for split in ("train", "valid", "test")] == texts and len(paths) == 3


def test_too_few_words_are_an_error_and_nothing_is_written(two_modules, monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "MINIMUM_WORDS", 12)
    with pytest.raises(UserError, match=r"^Python's library gives 11 words, not 12; .* give your own text$"):
        embedded.write_embedded_corpus(tmp_path / "new folder")
    assert not list(tmp_path.iterdir())


def test_a_cut_write_leaves_no_file(two_modules, monkeypatch, tmp_path):
    def cut(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(OSError, match="no space left"):
        embedded.write_embedded_corpus(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_library_without_source_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    line = (
        f"^the source of Python's library is not in {tmp_path}/python311.zip; use a Python that has its .py files, or "
    )
    with pytest.raises(UserError, match=line + "your own text$"):
        embedded.write_embedded_corpus(tmp_path / "corpus")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The whole corpus and the calls of `on_progress`."""
    calls = []
    paths = embedded.write_embedded_corpus(tmp_path_factory.mktemp("corpus"), lambda *call: calls.append(call))
    return paths, calls


def test_the_whole_corpus(corpus):
    paths, calls = corpus
    assert calls == [(done, len(calls)) for done in range(1, len(calls) + 1)] and len(calls) > 300
    assert [(split, path.name) for split, path in paths.items()] == [(name, f"{name}.txt") for name in embedded.SPLITS]
    lines = {split: path.read_text("utf-8").split("\n") for split, path in paths.items()}
    assert all(split_lines.pop() == "" for split_lines in lines.values())  # each ends in a newline
    every = [line for split_lines in lines.values() for line in split_lines]
    assert len(set(every)) == len(every)
    assert "len(obj, /): Return the number of items in a container." in lines["train"]
    assert sum(line.startswith('"pass" is a null operation') for line in every) == 1
    words = {split: sum(len(line.split()) for line in split_lines) for split, split_lines in lines.items()}
    total = sum(words.values())
    assert 400_000 <= total <= 500_000
    assert 0.88 <= words["train"] / total <= 0.92
    assert 0.04 <= words["valid"] / total <= 0.06 and 0.04 <= words["test"] / total <= 0.06
    for line in every:
        assert line == " ".join(line.split()) and line.isascii() and len(line.split()) >= 3


def test_the_corpus_becomes_the_same_data_in_another_process(corpus, tmp_path):
    """By the command that the demo uses."""
    root = str(Path(embedded.__file__).parents[1])
    environment = {**os.environ, "PYTHONHASHSEED": "1", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": root}
    command = [sys.executable, "-m", "data_prep", "embedded", "--out", tmp_path / "data", "--vocab-size", "2000"]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    record = json.loads((tmp_path / "data" / "provenance.json").read_text())
    for split, path in corpus[0].items():
        assert [source["sha256"] for source in record["sources"][split]] == [sha256_of_file(path)]
        assert record["splits"][split]["words"] == len(path.read_text("utf-8").split())
