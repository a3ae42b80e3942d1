"""The demo's text: exactly the tokens that its updates take, and a part of valid and test."""

import importlib
import io
from pathlib import Path

import prepared
import pytest
from rich.console import Console

from data_prep.cli import main
from fairseq_hash.core.progress import Display
from fairseq_hash.hashing.dictionary import read_dictionary
from fairseq_hash.table_tools.token_streams import open_text

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def demo_data(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("demo_data")


def tokens_of(data, split):
    symbols, _ = read_dictionary(data / "dict.txt")
    return sum(map(len, open_text(data, split, symbols).blocks()))


def test_text_is_cut_to_what_is_seen_and_scored(demo_data, tmp_path, monkeypatch):
    """Each split is cut to its limit; a second call finds the part; a split that is shorter stays whole."""
    data = tmp_path / "data"
    assert main(prepared.arguments(prepared.write_text(tmp_path / "text"), data, "--words")) == 0
    display = Display(1, Console(file=io.StringIO()))
    whole = {split: tokens_of(data, split) for split in demo_data.SPLITS}
    monkeypatch.setattr(demo_data, "HELD_OUT", whole["valid"] - 1)
    expected = {"train": 500, "valid": whole["valid"] - 1, "test": min(whole["test"], whole["valid"] - 1)}
    part = demo_data.cut_data(data, 500, tmp_path / "out", display)
    assert whole["train"] > 500
    assert {split: tokens_of(part, split) for split in demo_data.SPLITS} == expected
    monkeypatch.setattr(demo_data, "run_logged", None)
    assert demo_data.cut_data(data, 500, tmp_path / "out", display) == part
    monkeypatch.setattr(demo_data, "HELD_OUT", max(whole.values()))
    assert demo_data.cut_data(data, whole["train"], tmp_path / "out", display) == data
