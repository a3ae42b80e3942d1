"""The demo's training text: exactly the tokens that its updates take."""

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


def test_training_text_is_cut_to_what_is_seen(demo_data, tmp_path, monkeypatch):
    """Valid and test stay whole; a second call finds the part; a text that is too short stays as it is."""
    data = tmp_path / "data"
    assert main(prepared.arguments(prepared.write_text(tmp_path / "text"), data, "--words")) == 0
    display = Display(1, Console(file=io.StringIO()))
    part = demo_data.cut_data(data, 500, tmp_path / "out", display)
    assert tokens_of(part, "train") == 500 < tokens_of(data, "train")
    assert all(tokens_of(part, split) == tokens_of(data, split) for split in ("valid", "test"))
    monkeypatch.setattr(demo_data, "run_logged", None)
    assert demo_data.cut_data(data, 500, tmp_path / "out", display) == part
    assert demo_data.cut_data(data, tokens_of(data, "train"), tmp_path / "out", display) == data
