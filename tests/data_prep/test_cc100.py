"""CC-100 from its archive: documents dealt out to splits, parts of it, damage."""

import io
import lzma
import os

import pytest
from archives import ONE_FOLDER, documents, fails, fetch, xz
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import corpora
from data_prep.corpora import CORPORA, SPLITS, split_of_document


def expected_splits(texts, a_round=2000):
    """The splits of documents, by the rule in words: the last two of every 2000."""
    dealt = {split: [] for split in SPLITS}
    for begin in range(0, len(texts), a_round):
        dealt["train"] += texts[begin : begin + a_round - 2]
        dealt["valid"] += texts[begin + a_round - 2 : begin + a_round - 1]
        dealt["test"] += texts[begin + a_round - 1 : begin + a_round]
    return {split: b"\n".join(dealt[split]) for split in SPLITS}


def test_cc100_is_split_by_documents(tmp_path):
    seen, texts = [], documents(4100)
    archive = xz(tmp_path / "en.txt.xz", texts)
    found = fetch(CORPORA["cc100-en"], tmp_path / "text", archive, on_progress=lambda *parts: seen.append(parts))
    assert found == expected_splits(texts)
    assert found["valid"].count(b"\n\n") == 1
    assert all(phase == "unpack" and 0 < done <= total == archive.stat().st_size for phase, done, total in seen)
    assert seen == sorted(seen) and len(seen) == 4


def test_split_rule():
    assert [split_of_document(number) for number in (0, 1997, 1998, 1999, 2000, 3998, 3999)] == [
        "train", "train", "valid", "test", "train", "valid", "test",
    ]  # fmt: skip


LINES = st.lists(st.sampled_from([b"\n", b" \t\n", b"\r\n", b"a\n", b" a b\n", b"b\r\n"]))


@settings(max_examples=50)
@given(lines=LINES, end=st.sampled_from([b"", b"the end", b" "]))
def test_documents_keep_every_line_with_text(lines, end):
    """No line is lost or moved, none in a document is blank, and there is a blank line wherever one document ends."""
    text = b"".join(lines) + end
    found = list(corpora._documents(io.BytesIO(text)))
    kept = [line.removesuffix(b"\n") for line in text.splitlines(keepends=True) if line.strip()]
    assert b"".join(found).split(b"\n")[:-1] == [line.rstrip(b"\n") for line in kept]
    blank = [not line.strip() for line in io.BytesIO(text)]
    begins = sum(not this and (place == 0 or blank[place - 1]) for place, this in enumerate(blank))
    assert len(found) == begins


def test_documents_are_taken_as_they_come():
    """The stream is read no further than the documents that are asked for: memory holds one document."""
    lines = iter([b"a\n", b"\n", b"b\n", b"\n", b"c\n"])
    found = corpora._documents(lines)
    assert next(found) == b"a\n" and next(lines) == b"b\n"


@pytest.fixture
def small_rounds(monkeypatch):
    monkeypatch.setattr(corpora, "DOCUMENTS_A_ROUND", 10)


@settings(max_examples=25, suppress_health_check=ONE_FOLDER)
@given(spare=st.integers(0, 1000))
def test_max_bytes_takes_whole_documents_from_the_beginning(tmp_path, small_rounds, spare):
    texts = documents(35)
    sizes = [sum(map(len, expected_splits(texts[:number], 10).values())) for number in range(36)]
    archive, limit = xz(tmp_path / "en.txt.xz", texts), sizes[10] + spare
    taken = max(number for number in range(36) if sizes[number] <= limit)
    assert fetch(CORPORA["cc100-en"], tmp_path / "text", archive, limit) == expected_splits(texts[:taken], 10)


def test_max_bytes_reads_no_further_than_it_must(tmp_path, monkeypatch):
    """The beginning of an archive is enough."""
    monkeypatch.setattr(corpora, "BLOCK", 1000)
    texts, seen = documents(2100), []
    tail = [os.urandom(1000).hex().encode() + b"\n\n" for _ in range(200)]
    archive = xz(tmp_path / "en.txt.xz", texts + tail)
    archive.write_bytes(archive.read_bytes()[:-100_000])
    limit = sum(map(len, texts)) + 2097
    found = fetch(CORPORA["cc100-en"], tmp_path / "text", archive, limit, on_progress=lambda *parts: seen.append(parts))
    assert found == expected_splits(texts)
    assert seen[-1][0] == "unpack" and 0 < seen[-1][1] < seen[-1][2] == limit
    fails(CORPORA["cc100-en"], tmp_path / "text", "is damaged", "ended before", local=archive)


@pytest.mark.parametrize(("number", "limit", "empty"), [(1998, None, "valid and test"), (1999, None, "test")])
def test_too_few_documents(tmp_path, number, limit, empty):
    archive = xz(tmp_path / "en.txt.xz", documents(number))
    fails(CORPORA["cc100-en"], tmp_path / "text", f"{archive} has too little text for {empty};", local=archive)


@pytest.mark.parametrize(("limit", "empty"), [(5, "train and valid and test"), (1000, "valid and test")])
def test_too_small_max_bytes(tmp_path, limit, empty):
    archive = xz(tmp_path / "en.txt.xz", documents(2100))
    parts = f"within --max-bytes {limit} for {empty};", "2000 documents"
    fails(CORPORA["cc100-en"], tmp_path / "text", *parts, local=archive, max_bytes=limit)


def test_max_bytes_without_sense(tmp_path):
    fails(CORPORA["cc100-en"], tmp_path / "text", "--max-bytes 0 takes no text", max_bytes=0)
    fails(CORPORA["wikitext-2"], tmp_path / "text", "--max-bytes 9 needs", "wikitext-2 whole", max_bytes=9)
    fails(CORPORA["cc100-en"], tmp_path / "text", f"{tmp_path} whole", local=tmp_path, max_bytes=9)


@settings(max_examples=50, suppress_health_check=ONE_FOLDER)
@given(data=st.data())
def test_flipped_bit_in_an_xz(tmp_path, small_rounds, data):
    content = bytearray(lzma.compress(b"\n".join(documents(35))))
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    archive = tmp_path / "en.txt.xz"
    archive.write_bytes(content)
    fails(CORPORA["cc100-en"], tmp_path / "text", "is damaged", "delete it and run again", local=archive)


@settings(max_examples=25, suppress_health_check=ONE_FOLDER)
@given(data=st.data())
def test_truncated_xz(tmp_path, small_rounds, data):
    content = lzma.compress(b"\n".join(documents(35)))
    archive = tmp_path / "en.txt.xz"
    archive.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    fails(CORPORA["cc100-en"], tmp_path / "text", "is damaged", local=archive)
