"""WikiText from its archives and unpacked files, and what all corpora share."""

import hashlib
import os
import resource
import zipfile
from dataclasses import replace

import pytest
from archives import ONE_FOLDER, WIKI, documents, fails, fetch, unchecked, whole_or_told, wikitext, xz, zipped
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import corpora
from data_prep.corpora import CORPORA, SPLITS
from data_prep.download import RemoteFile, exclusive


@pytest.fixture
def made(tmp_path):
    """A function that writes an archive of some texts and returns its corpus and its path."""
    archive = tmp_path / "archive.zip"
    return lambda texts=WIKI, method=zipfile.ZIP_DEFLATED: (wikitext(archive, zipped(texts, method)), archive)


def test_known_corpora():
    assert list(CORPORA) == ["wikitext-103", "wikitext-2", "cc100-en"]
    for name, corpus in CORPORA.items():
        assert corpus.name == name and corpus.licence and corpus.note
    wiki = CORPORA["wikitext-103"]
    assert wiki.archive == "wikitext-103-v1.zip"
    assert [CORPORA[name].file.size for name in CORPORA] == [190_229_076, 4_475_746, None]
    assert [CORPORA[name].file.sha256[:8] for name in ("wikitext-103", "wikitext-2")] == ["242ba0f2", "92675f1d"]
    assert wiki.members["valid"] == "wikitext-103/wiki.valid.tokens"
    assert wiki.expected_tokens == {"train": 103_227_021, "valid": 217_646, "test": 245_569}


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_wikitext_goes_out_byte_for_byte(made, tmp_path, method):
    seen = []
    corpus, archive = made(method=method)
    folder = tmp_path / "new" / "folder"
    assert fetch(corpus, folder, archive, on_progress=lambda *progress: seen.append(progress)) == WIKI
    size = sum(map(len, WIKI.values()))
    assert seen[-1] == ("unpack", size, size) and seen == sorted(seen)


def test_long_text_goes_out_in_blocks(made, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "BLOCK", 7)
    corpus, archive = made()
    assert fetch(corpus, tmp_path / "text", archive) == WIKI


def test_wikitext_is_downloaded_once(tmp_path, server):
    server.content = zipped(WIKI)
    corpus = replace(CORPORA["wikitext-2"], file=server.file(server.content))
    seen = []
    assert fetch(corpus, tmp_path / "text", on_progress=lambda *progress: seen.append(progress)) == WIKI
    size = corpus.file.size
    assert [progress for progress in seen if progress[0] == "download"][-1] == ("download", size, size)
    assert seen[-1][0] == "unpack"
    server.faults = [{"status": 404}]
    assert fetch(corpus, tmp_path / "text") == WIKI
    (tmp_path / "text" / corpus.archive).unlink()
    fails(corpus, tmp_path / "text", corpus.file.url, "404", "--local PATH")


def test_cc100_is_downloaded(tmp_path, server):
    server.content = xz(tmp_path / "en.txt.xz", documents(2000)).read_bytes()
    corpus = replace(CORPORA["cc100-en"], file=RemoteFile(server.url, None, None))
    assert fetch(corpus, tmp_path / "text")["test"] == documents(2000)[1999]


@pytest.mark.parametrize("change", ["size", "content"])
def test_another_archive_is_refused(tmp_path, change):
    content = zipped(WIKI)
    archive = tmp_path / "archive.zip"
    corpus = wikitext(archive, content)
    if change == "size":
        archive.write_bytes(content + b"!")
        found, expected = f"{len(content) + 1} bytes", f"{len(content)} are expected"
    else:
        other = content[:9] + bytes([content[9] ^ 1]) + content[10:]
        archive.write_bytes(other)
        found, expected = hashlib.sha256(other).hexdigest(), corpus.file.sha256
    fails(corpus, tmp_path / "text", f"--local {archive}", found, expected, corpus.file.url, local=archive)


def test_local_that_does_not_exist(tmp_path):
    local = tmp_path / "nowhere"
    fails(CORPORA["wikitext-2"], tmp_path / "text", f"--local {local} does not", "wikitext-2-v1.zip", local=local)


def test_missing_member(made, tmp_path):
    corpus, archive = made({"train": b"a\n", "valid": b"b\n"})
    missing = f"{archive} has no wikitext-2/wiki.test.tokens; use --local PATH"
    fails(corpus, tmp_path / "text", missing, local=archive)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("text", [b"", b" \n\n \r\n"])
def test_member_without_text(made, tmp_path, split, text):
    corpus, archive = made({**WIKI, split: text})
    fails(corpus, tmp_path / "text", f"wiki.{split}.tokens in {archive} has no text", local=archive)


@pytest.mark.parametrize("name", ["wikitext-2", "cc100-en"])
@pytest.mark.parametrize("content", [b"", b"<html>Not found</html>"])
def test_no_archive_at_all(tmp_path, name, content):
    archive = tmp_path / "archive"
    archive.write_bytes(content)
    corpus = unchecked(CORPORA[name])
    fails(corpus, tmp_path / "text", f"{archive} is damaged or not an archive of {name}", "--local", local=archive)


def test_encrypted_looking_zip(tmp_path):
    archive, content = tmp_path / "archive.zip", bytearray(zipped(WIKI))
    place = content.rindex(b"PK\x01\x02")
    content[place + 8] |= 1
    corpus = wikitext(archive, content)
    fails(corpus, tmp_path / "text", "is damaged", "encrypted", "delete it and run again", local=archive)


@settings(max_examples=50, suppress_health_check=ONE_FOLDER)
@given(data=st.data())
def test_flipped_bit_in_a_zip(tmp_path, data):
    """zip's own checksums tell, even where none of the archive is published."""
    content = bytearray(zipped(WIKI))
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    archive = tmp_path / "archive.zip"
    corpus = unchecked(wikitext(archive, content))
    whole_or_told(corpus, tmp_path / "text", archive, WIKI)


@settings(max_examples=25, suppress_health_check=ONE_FOLDER)
@given(data=st.data())
def test_truncated_zip(tmp_path, data):
    content = zipped(WIKI)
    archive = tmp_path / "archive.zip"
    corpus = unchecked(wikitext(archive, content[: data.draw(st.integers(0, len(content) - 1))]))
    fails(corpus, tmp_path / "text", "is damaged", local=archive)


@pytest.mark.parametrize(
    "names", [("wiki.{}.tokens", "wiki.{}.tokens"), ("{}.txt", "{}.txt"), ("wiki.{}.tokens", "{}.txt")]
)
def test_unpacked_wikitext(tmp_path, names):
    for split, text in WIKI.items():
        (tmp_path / names[split == "test"].format(split)).write_bytes(text)
    (tmp_path / "text").mkdir()
    seen = []
    texts = fetch(CORPORA["wikitext-2"], tmp_path / "text", tmp_path, on_progress=lambda *parts: seen.append(parts))
    assert texts == WIKI
    size = sum(map(len, WIKI.values()))
    assert seen[-1] == ("unpack", size, size)


def test_unpacked_in_the_folder_of_the_text(tmp_path):
    for split, text in WIKI.items():
        (tmp_path / f"{split}.txt").write_bytes(text)
    assert fetch(CORPORA["cc100-en"], tmp_path, tmp_path) == WIKI


@pytest.mark.parametrize(
    ("name", "accepted"), [("wikitext-2", "wiki.test.tokens or test.txt"), ("cc100-en", "test.txt")]
)
def test_unpacked_files_that_are_missing(tmp_path, name, accepted):
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_bytes(b"text\n")
    archive = CORPORA[name].archive
    fails(CORPORA[name], tmp_path / "text", f"--local {tmp_path} has no {accepted}", archive, local=tmp_path)


def test_unpacked_file_without_text(tmp_path):
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_bytes(b"text\n" if split != "valid" else b"\n")
    fails(CORPORA["cc100-en"], tmp_path / "text", f"{tmp_path / 'valid.txt'} has no text", local=tmp_path)


def test_earlier_text_is_replaced_only_by_whole_text(made, tmp_path):
    (corpus, archive), folder = made(), tmp_path / "text"
    fetch(corpus, folder, archive)
    fails(made({**WIKI, "test": b""})[0], folder, "no text", local=archive)
    assert {split: (folder / f"{split}.txt").read_bytes() for split in SPLITS} == WIKI
    (folder / ".train.txt.0123abcd.partial").write_bytes(b"left by a killed process")
    changed = {split: text + b"changed\n" for split, text in WIKI.items()}
    assert fetch(made(changed)[0], folder, archive) == changed
    assert len(os.listdir(folder)) == 3


def test_two_at_once(made, tmp_path):
    (corpus, archive), folder = made(), tmp_path / "text"
    folder.mkdir()
    with exclusive(folder / "unpack.lock"):
        fails(corpus, folder, "in use by another process", local=archive)


def test_disk_that_is_full(made, tmp_path):
    """A limit on file sizes stands in for the disk's."""
    (corpus, archive), folder = made(), tmp_path / "text"
    folder.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(WIKI["train"]) - 1, hard))
    try:
        fails(corpus, folder, f"{folder}: File too large; fix that and run again", local=archive)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_folder_that_cannot_be_made(made, tmp_path):
    corpus, archive = made()
    fails(corpus, archive / "text", "Not a directory", "run again", local=archive)
