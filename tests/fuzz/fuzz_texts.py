"""Readers of text and archives for data preparation, and of what it leaves in a folder of data."""

import bz2
import functools
import gzip
import lzma
import tempfile
from dataclasses import replace
from pathlib import Path

from archives import WIKI, documents, zipped
from fairseq.data import Dictionary
from fuzz_formats import json_tree, zip_tree
from fuzz_mutations import Seed, Tree
from fuzz_rounds import Reader
from fuzz_seeds import symbols

from data_prep import pieces
from data_prep.corpora import CORPORA, fetch_text
from data_prep.dialogue import count
from data_prep.download import _remembered
from data_prep.text import check_files, read_lines
from fairseq_hash.api.tokenizer import tokenizer_for
from fairseq_hash.export.tokens import _check_pieces

TEXT = " ".join(symbols()[4:24]).encode() + "\n naïve\u2028café\r\n\n".encode()
DIALOGUE = b"user: Please find a table.\nsystem: For how many?\nuser:\n\nuser: Play a song.\nsystem: Done.\n\n" * 3
PACKED = {".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress}
# An xz that any lzma reader takes, with a dictionary of 4 GiB in its first bytes, which no checksum protects.
ALONE = b"\x5d" + (2**32 - 1).to_bytes(4, "little") + b"\xff" * 8 + lzma.compress(TEXT, format=lzma.FORMAT_ALONE)[13:]


def _large_dictionary() -> bytes:
    """Return a sound xz file that wants a dictionary of 1.5 GiB to be read."""
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1536 << 20, "mode": lzma.MODE_FAST, "mf": lzma.MF_HC3}
    ]
    small = lzma.compress(TEXT, filters=[{**filters[0], "dict_size": 1 << 20}])
    # The block's header: its size, flags, the filter's id, the size of its properties, the dictionary's size, padding.
    header = bytearray(small[12:24])
    header[4] = 37  # 1.5 GiB
    header[8:12] = __import__("zlib").crc32(header[:8]).to_bytes(4, "little")
    return small[:12] + bytes(header) + small[24:]


def packed_seeds() -> list[Seed]:
    """Return texts, plain and compressed: what is compressed is mutated, or its bytes."""
    seeds: list[Seed] = [{"t.txt": TEXT * 5}, {"t.txt": DIALOGUE}]
    for ending, pack in PACKED.items():
        seeds += [{f"t.txt{ending}": Tree(text, pack)} for text in (TEXT * 5, DIALOGUE)]
        seeds.append({f"t.txt{ending}": pack(TEXT * 2) + pack(DIALOGUE)})  # in two streams
    return seeds


def packed_hostile() -> list[Seed]:
    """Return compressed files that want much memory, and a line that is too long."""
    long_line = gzip.compress(b"a" * (17 << 20))
    return [{"t.txt.xz": ALONE}, {"t.txt.xz": _large_dictionary()}, {"t.txt.gz": long_line}]


def read_packed(folder: Path) -> None:
    """Read all lines, and see whether they are dialogues."""
    (path,) = folder.iterdir()
    check_files([path])
    for _ in read_lines([path], lambda done: None):
        pass
    if TEXT[:10] not in path.read_bytes() and b"user:" in path.read_bytes():
        count([path])


WIKITEXT = replace(CORPORA["wikitext-2"], file=replace(CORPORA["wikitext-2"].file, size=None, sha256=None))


@functools.cache
def _documents() -> bytes:
    return b"\n".join(documents(2000))


def archive_seeds() -> list[Seed]:
    """Return archives of the two forms of public corpora, as bytes and with their content."""
    return [
        {"a.zip": zipped(WIKI)},
        {"a.zip": zip_tree(zipped(WIKI))},
        {"a.xz": lzma.compress(_documents(), preset=0)},
        {"a.xz": Tree(_documents(), lambda text: lzma.compress(text, preset=0))},
    ]


def archive_hostile() -> list[Seed]:
    """Return archives that want much memory to be read."""
    return [{"a.xz": ALONE}, {"a.xz": _large_dictionary()}]


def read_archive(folder: Path) -> None:
    """Unpack an archive to texts."""
    (path,) = folder.iterdir()
    corpus = WIKITEXT if path.suffix == ".zip" else CORPORA["cc100-en"]
    fetch_text(corpus, folder / "out", path, None, lambda phase, done, total: None)


@functools.cache
def _model() -> bytes:
    text = "\n".join(" ".join(symbols()[4 + n :]) for n in range(30))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text").write_text(text)
        pieces.train_model(Path(folder) / "text", Path(folder) / "model", 300)
        return (Path(folder) / "model").read_bytes()


def piece_seeds() -> list[Seed]:
    """Return a SentencePiece model, and the sidecar of a download."""
    sidecar = {"url": "http://x/y", "validator": '"abc"', "total": 1000}
    return [{"sentencepiece.model": _model(), "sidecar": json_tree(sidecar)}]


def piece_hostile() -> list[Seed]:
    """Return what is no model."""
    return [{"sentencepiece.model": content, "sidecar": b"{}"} for content in (b"", b"x" * 100)]


def read_pieces(folder: Path) -> None:
    """Read a model as `load`, the export and data preparation do, and use it."""
    path = folder / "sentencepiece.model"
    remembered = _remembered(folder / "sidecar", "http://x/y")
    assert isinstance(remembered["validator"], (str, type(None))), remembered
    tokenizer = tokenizer_for(folder, None, Dictionary())
    tokenizer.decode(tokenizer.encode("hash table café"))
    _check_pieces(path, symbols()[:4])
    pieces.model_pieces(path)


READERS = (
    Reader("text, plain and compressed", packed_seeds, read_packed, packed_hostile),
    Reader("archive of a corpus", archive_seeds, read_archive, archive_hostile),
    Reader("SentencePiece model", piece_seeds, read_pieces, piece_hostile),
)
