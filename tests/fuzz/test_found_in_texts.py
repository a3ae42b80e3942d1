"""What fuzzing has found in readers of text and archives.

Each input is the smallest that showed a traceback, or took too long or too much memory. Now it ends in one line.
"""

import io
import lzma
import zipfile

import numpy as np
import pytest
from fairseq.data import Dictionary
from fuzz_formats import torch_bytes
from fuzz_found import DEEP, refused, written
from fuzz_seeds import kept, symbols
from fuzz_texts import ALONE, PACKED, TEXT, _large_dictionary

from data_prep.corpora import CORPORA, fetch_text
from data_prep.download import _remembered
from data_prep.options import check_like
from data_prep.text import read_lines
from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing.dictionary import read_dictionary


@pytest.mark.parametrize("content", ['["identity"]', '{"identity": "words"}', DEEP])
def test_a_record_of_data_that_is_no_object(tmp_path, content):
    written(tmp_path / "dict.txt", kept()["data/dict.txt"])
    written(tmp_path / "provenance.json", content)
    check_like(tmp_path, words=True)  # it does not say how the data was made


@pytest.mark.parametrize("content", [ALONE, _large_dictionary()], ids=["without a checksum", "with checksums"])
def test_an_xz_file_that_asks_for_gigabytes(tmp_path, content):
    path = written(tmp_path / "t.xz", content)
    assert "cannot read" in refused(lambda: list(read_lines([path], lambda done: None)))
    assert "damaged or not an archive" in refused(
        fetch_text, CORPORA["cc100-en"], tmp_path / "out", path, None, lambda *progress: None
    )


def test_xz_files_are_read_whole(tmp_path):
    """In several streams with zeros between and behind them, as xz reads them, and not with anything else there."""
    pack = PACKED[".xz"]
    whole = (
        (pack(TEXT), TEXT),
        (pack(TEXT * 3000) + pack(TEXT), TEXT * 3001),
        (pack(TEXT) + bytes(8) + pack(TEXT) + bytes(4), TEXT * 2),
        (pack(b"x"), b"x"),
    )
    for content, text in whole:
        lines = list(read_lines([written(tmp_path / "t.xz", content)], lambda done: None))
        assert lines == [line.rstrip("\r") for line in text.decode().removesuffix("\n").split("\n")]
    for content in (pack(TEXT)[:-1], pack(TEXT) + b"x", pack(TEXT)[:20], b""):
        path = written(tmp_path / "t.xz", content)
        assert refused(lambda path=path: list(read_lines([path], lambda done: None)))


def test_a_document_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.corpora.LONGEST_DOCUMENT", 1000)
    path = written(tmp_path / "a.xz", lzma.compress(b"word\n" * 500))
    message = refused(fetch_text, CORPORA["cc100-en"], tmp_path / "out", path, None, lambda *progress: None)
    assert "without a blank line" in message


@pytest.mark.parametrize(
    "content",
    [DEEP, "[]", '{"url": "u", "validator": 5, "total": 1}', '{"url": "u", "validator": "a\\r\\nb", "total": 1}'],
)
def test_a_sidecar_of_a_download_that_says_something_else(tmp_path, content):
    """What it says would be sent in a header."""
    assert _remembered(written(tmp_path / "sidecar", content), "u") == {"validator": None, "total": None}


def test_archives_and_arrays_that_are_used_here_are_what_they_seem():
    assert zipfile.is_zipfile(io.BytesIO(torch_bytes({})))
    assert np.frombuffer(kept()["data/train.bin"], dtype="<u2").max() < len(symbols())


@pytest.mark.parametrize("text", ["the 5\n\nof 3\n", "the 5\nof 3\n\n", "\n", "the 5\n \t\nof 3\n"])
def test_dictionary_with_a_blank_line_is_refused(tmp_path, text):
    """fairseq refuses it as well, with a traceback; here it had been left out."""
    path = tmp_path / "dict.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=r"line \d is not a symbol and its count"):
        read_dictionary(path)
    with pytest.raises(ValueError, match="Incorrect dictionary format"):
        Dictionary.load(str(path))
