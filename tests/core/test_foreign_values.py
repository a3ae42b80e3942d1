"""What other people's files can hold: messages stay one line, values are of their kinds, nesting and aliases end."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_hash.core.errors import LONGEST, UserError
from fairseq_hash.core.fields import fits, wrong_field
from fairseq_hash.core.json_text import parse_json, parse_object
from fairseq_hash.core.yaml_text import check_yaml


@given(st.text(max_size=50))
def test_a_message_is_one_printable_line(text):
    message = str(UserError(f"the symbol {text} is there twice"))
    assert message.isprintable() and message.startswith("the symbol ") and message.endswith(" is there twice")


def test_a_message_keeps_its_ends():
    message = str(UserError(f"begin {'x' * 10**6} end"))
    assert len(message) <= LONGEST and message.startswith("begin xx") and message.endswith("xx end")


def test_a_message_cannot_speak_to_a_terminal():
    assert str(UserError("a\x1b[31mb\r\n\tc\u202ed\ud800")) == "a?[31mb c?d?"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "{", "", "\x00", b"\xff", '"\\ud800"'])
def test_json_that_cannot_be_read_is_one_kind_of_error(text):
    with pytest.raises(ValueError, match=r"nested too deeply|Exceeds the limit|line 1 column|surrogates|decode byte"):
        parse_json(text)


def test_an_object_is_asked_for():
    assert parse_object('{"a": [1]}') == {"a": [1]}
    for text in ("[1]", "null", '"a"', "1"):
        with pytest.raises(ValueError, match="no JSON object"):
            parse_object(text)


@dataclass(frozen=True)
class Inner:
    shares: list[float]


@dataclass(frozen=True)
class Outer:
    name: str
    count: "int | None" = None
    inner: dict[str, Inner] = field(default_factory=dict)
    pairs: tuple[tuple[str, int], ...] = ()


@pytest.mark.parametrize(
    ("value", "kind", "is_fit"),
    [
        (1, int, True),
        (True, int, False),
        (1, bool, False),
        (2**63, int, False),
        (-(2**63), int, True),
        (1, float, True),
        (10**400, float, False),
        (float("nan"), float, False),
        (float("inf"), float, False),
        ("1", float, False),
        ("a\ud800", str, False),
        ("naïve", str, True),
        ([1, 2.5], list[float], True),
        ([1, None], list[float], False),
        ((1, 2), list[float], False),
        ({"a": 1}, Mapping[str, int], True),
        ({1: 1}, dict[str, int], False),
        ((), tuple[int, ...], True),
        (("a", 1), tuple[str, int], True),
        (("a", 1, 1), tuple[str, int], False),
        (None, int | None, True),
        (object(), object, True),
    ],
)
def test_values_and_kinds(value, kind, is_fit):
    assert fits(value, kind) is is_fit


def test_the_wrong_field_is_named():
    assert wrong_field(Outer("a", 1, {"x": Inner([0.5])}, (("b", 2),))) is None
    assert wrong_field(Outer("a", "1")) == "count"
    assert wrong_field(Outer("a", 1, {"x": Inner([True])})) == "inner"
    assert wrong_field(Outer("a", 1, {}, (("b",),))) == "pairs"


def test_yaml_whose_aliases_grow(tmp_path):
    """Nine lists of nine aliases each stand for 400 million values."""
    path = tmp_path / "grows.yaml"
    lines = [f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in itertools.pairwise("abcdefghij")]
    path.write_text("\n".join(["a: &a [x]", *lines]))
    with pytest.raises(UserError, match="aliases that stand for more than 100,000 values"):
        check_yaml(path)
    path.write_text("a: &a [x, y]\nb: [*a, *a]\n")
    check_yaml(path)


@pytest.mark.parametrize(
    ("text", "said"), [("a: " + "[" * 20_000, "nested too deeply"), ("a" * (1 << 21), "more than 1 MiB")]
)
def test_yaml_that_is_nested_or_long(tmp_path, text, said):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        check_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["a: [1, {b: 2}]  # [[[", "a: &a {x: *a}", "a: *b", "[" * 10, "{}"])
def test_yaml_that_is_left_to_who_loads_it(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    check_yaml(tmp_path / "a.yaml")
