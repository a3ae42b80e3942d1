"""Small archives of the form of public corpora, and what must come out of them."""

import hashlib
import io
import lzma
import os
import zipfile
from dataclasses import replace

import pytest
from hypothesis import HealthCheck

from data_prep.corpora import CORPORA, SPLITS, fetch_text
from data_prep.download import RemoteFile
from fairseq_hash.core.errors import UserError

WIKI = {
    "train": " \n = Valkyria Chronicles III = \n \n Senjō no Valkyria 3 : <unk> Chronicles \r\n\n".encode() * 50,
    "valid": b" \n = Homarus gammarus = \n \n no newline at the end",
    "test": b" \n = Robert Boulter = \n \n An English <unk> film \n",
}


def zipped(texts, method=zipfile.ZIP_DEFLATED):
    """A stand-in for wikitext-2-v1.zip, other members first."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for split, text in [("../train", b"from outside"), ("train.old", b"old"), *texts.items()]:
            archive.writestr(f"wikitext-2/wiki.{split}.tokens", text)
    return buffer.getvalue()


def wikitext(path, content):
    """The corpus whose archive has this content; the archive is written to `path`."""
    path.write_bytes(content)
    published = RemoteFile(CORPORA["wikitext-2"].file.url, len(content), hashlib.sha256(content).hexdigest())
    return replace(CORPORA["wikitext-2"], file=published)


def unchecked(corpus):
    """The corpus as if no checksum were published."""
    return replace(corpus, file=replace(corpus.file, size=None, sha256=None))


def documents(number):
    return [f"Document {n} begins ,\n".encode() + b"and goes on .\n" * (n % 3) for n in range(number)]


def xz(path, texts, **options):
    path.write_bytes(lzma.compress(b"\n".join(texts), **options))
    return path


def ignore(phase, done, total):
    pass


def fetch(corpus, folder, local=None, max_bytes=None, on_progress=ignore):
    """The text of each split; nothing but the three files has appeared in `folder`."""
    before = set(os.listdir(folder)) if folder.exists() else set()
    paths = fetch_text(corpus, folder, local, max_bytes, on_progress)
    assert paths == {split: folder / f"{split}.txt" for split in SPLITS}
    assert set(os.listdir(folder)) - before <= {"train.txt", "valid.txt", "test.txt", corpus.archive}
    return {split: path.read_bytes() for split, path in paths.items()}


def fails(corpus, folder, *parts, local=None, max_bytes=None):
    """It ends in one line with these parts, and leaves `folder` as it was."""
    before = set(os.listdir(folder)) if folder.exists() else set()
    with pytest.raises(UserError) as caught:
        fetch_text(corpus, folder, local, max_bytes, ignore)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert (set(os.listdir(folder)) if folder.exists() else set()) == before


def whole_or_told(corpus, folder, archive, expected):
    """A damaged archive gives the text as it should be, or one line and no text."""
    try:
        assert fetch(corpus, folder, archive) == expected
    except UserError as error:
        assert "\n" not in str(error)
        assert not folder.exists() or os.listdir(folder) == []
        return
    for split in SPLITS:
        (folder / f"{split}.txt").unlink()


ONE_FOLDER = [HealthCheck.function_scoped_fixture]  # one tmp_path for all examples
