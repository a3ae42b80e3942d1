"""Public corpora: from their archives to three plain text files (train, valid, test)."""

import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import atomic_write, remove_partials

from .download import OnProgress, RemoteFile, download, exclusive, mismatch
from .text import open_xz

SPLITS = ("train", "valid", "test")
BLOCK = 1 << 20  # bytes

# For a corpus without splits of its own: of every 2000 documents the last two go to valid and test. So both are spread
# over the whole corpus, a smaller part of the corpus has the same documents in them, and each has about 0.05 % of it (5
# MB of 10 GB).
DOCUMENTS_A_ROUND = 2000
LONGEST_DOCUMENT = 1 << 28  # bytes; a document is held in memory

OnPhase = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Corpus:
    """A public corpus: its archive and, if published, the figures against which a preparation can be checked.

    `members`: the archive's text file for each split; None for an xz stream of documents that we split ourselves.
    `expected_tokens`: tokens per split, words and one <eos> per line (blank lines too).
    """

    name: str
    file: RemoteFile
    licence: str
    note: str
    members: dict[str, str] | None = None
    expected_tokens: dict[str, int] | None = None

    @property
    def archive(self) -> str:
        """The name of the archive's file."""
        return self.file.url.rpartition("/")[2]


def _wikitext(name: str, size: int, sha256: str, train_tokens: int) -> Corpus:
    return Corpus(
        name=name,
        file=RemoteFile(f"https://wikitext.smerity.com/{name}-v1.zip", size, sha256),
        licence="Creative Commons Attribution-ShareAlike (text of Wikipedia)",
        note="Merity et al. 2016, Pointer Sentinel Mixture Models; word-level, rare words are <unk>",
        members={split: f"{name}/wiki.{split}.tokens" for split in SPLITS},
        expected_tokens={"train": train_tokens, "valid": 217_646, "test": 245_569},
    )


# WikiText's sizes are published in huggingface/datasets (datasets/wikitext/dataset_infos.json), its SHA-256 there and
# in other public repositories: for both archives at their first address, and for wikitext-103 at this one too. When
# this was written, the files themselves could not be downloaded for a check. The figures are those of Merity et al.
# 2016.
CORPORA: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        _wikitext(
            "wikitext-103",
            190_229_076,
            "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
            103_227_021,
        ),
        _wikitext(
            "wikitext-2",
            4_475_746,
            "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
            2_088_628,
        ),
        # No checksum is published. Damage is found by xz's own check of every block (CRC64 unless its maker chose
        # another) and by a missing end. Nothing shows whether others used the same file, so its fingerprint is
        # recorded.
        Corpus(
            name="cc100-en",
            file=RemoteFile("https://data.statmt.org/cc-100/en.txt.xz", None, None),
            licence="none claimed on the preparation of the corpus; Common Crawl's terms of use hold for the content",
            note="Conneau et al. 2020 and Wenzek et al. 2020; web text of 2018, about 82 GB compressed",
        ),
    )
}


def fetch_text(
    corpus: Corpus, folder: Path, local: Path | None, max_bytes: int | None, on_progress: OnPhase
) -> dict[str, Path]:
    """Write a corpus to `train.txt`, `valid.txt` and `test.txt` in `folder` and return their paths by split.

    WikiText and unpacked files are copied byte for byte. CC-100 has one paragraph per line and a blank line between
    documents, in each split as in the whole; see `DOCUMENTS_A_ROUND` for the splits. Either all three files appear
    whole or none does. Memory depends only on the longest document. Nothing is decoded: the reader checks that the text
    is UTF-8.

    Args:
        corpus: one of `CORPORA`.
        folder: for the text, and for the archive if it is downloaded (it stays there); created if missing.
        local: the archive, or a folder with the unpacked files (by their names in the archive, or `train.txt`,
            `valid.txt`, `test.txt`); None downloads.
        max_bytes: for CC-100 archives: take whole documents from the beginning as long as the three files together have
            no more bytes than this. Unpacking ends there, so the beginning of an archive is enough, and the rest of
            xz's last block is not checked.
        on_progress: called with the phase, the bytes done and the total bytes: `download` counts the archive; `unpack`
            counts the text, or the archive if the amount of text is not known.

    Raises:
        UserError: if the corpus is not available, is damaged or not the published one, or has no text in a split.
    """
    if max_bytes is not None and (corpus.members or (local and local.is_dir())):
        raise UserError(
            f"--max-bytes {max_bytes} needs a corpus that is split here, from its archive (cc100-en); "
            f"leave it out to take {local or corpus.name} whole"
        )
    if max_bytes is not None and max_bytes < 1:
        raise UserError(f"--max-bytes {max_bytes} takes no text; give 1 or more, or leave it out to take all")
    try:
        source = _source(corpus, folder, local, on_progress)
        folder.mkdir(parents=True, exist_ok=True)
        with _whole_files(folder) as files:
            _unpack(corpus, source, max_bytes, files, lambda done, total: on_progress("unpack", done, total))
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}; fix that and run again") from error
    return {split: folder / f"{split}.txt" for split in SPLITS}


def _source(corpus: Corpus, folder: Path, local: Path | None, on_progress: OnProgress) -> Path:
    """Return the archive or the folder of unpacked files: downloaded if none is given, and checked if possible."""
    if local is None:
        return download(corpus.file, folder / corpus.archive, lambda done, total: on_progress("download", done, total))
    if local.is_file() and (problem := mismatch(corpus.file, local)):
        raise UserError(f"--local {local} {problem} for {corpus.name}; give the archive of {corpus.file.url}")
    if not local.exists():
        raise UserError(f"--local {local} does not exist; give {corpus.archive} or a folder with its unpacked files")
    return local


def _unpacked(corpus: Corpus, folder: Path, split: str) -> Path:
    names = [f"{split}.txt"]
    if corpus.members:
        names.insert(0, corpus.members[split].rpartition("/")[2])
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"--local {folder} has no {' or '.join(names)}; put it there, or give {corpus.archive} instead")


@contextmanager
def _whole_files(folder: Path) -> Iterator[dict[str, BinaryIO]]:
    """Open a file for each split. All get their final names at the end, or none if something fails."""
    lock = folder / "unpack.lock"
    with exclusive(lock):
        try:
            remove_partials(folder)
            with ExitStack() as names:
                partials = {split: names.enter_context(atomic_write(folder / f"{split}.txt")) for split in SPLITS}
                with ExitStack() as files:
                    yield {split: files.enter_context(open(path, "wb")) for split, path in partials.items()}
        finally:
            lock.unlink(missing_ok=True)


def _unpack(
    corpus: Corpus, source: Path, max_bytes: int | None, files: dict[str, BinaryIO], on_progress: OnProgress
) -> None:
    try:
        if source.is_dir():
            _copy([_unpacked(corpus, source, split) for split in SPLITS], files, on_progress)
        elif corpus.members:
            _unzip(source, corpus.members, files, on_progress)
        else:
            _split_documents(source, max_bytes, files, on_progress)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        # RuntimeError: a damaged zip entry can look encrypted, or compressed in an unknown way.
        raise UserError(
            f"{source} is damaged or not an archive of {corpus.name} ({type(error).__name__}: {error}); "
            "delete it and run again, or use --local PATH with a sound one"
        ) from error


def _copy(sources: list[Path], files: dict[str, BinaryIO], on_progress: OnProgress) -> None:
    total = sum(source.stat().st_size for source in sources)
    done = 0
    for source, split in zip(sources, SPLITS, strict=True):
        with open(source, "rb") as text:
            done = _pour(text, files[split], str(source), done, total, on_progress)


def _unzip(source: Path, members: dict[str, str], files: dict[str, BinaryIO], on_progress: OnProgress) -> None:
    done = 0
    with zipfile.ZipFile(source) as archive:
        if missing := [name for name in members.values() if name not in archive.namelist()]:
            raise UserError(f"{source} has no {' and no '.join(missing)}; use --local PATH with another archive")
        total = sum(archive.getinfo(name).file_size for name in members.values())
        for split, name in members.items():
            with archive.open(name) as text:
                done = _pour(text, files[split], f"{name} in {source}", done, total, on_progress)


def _pour(text: BinaryIO, file: BinaryIO, name: str, done: int, total: int, on_progress: OnProgress) -> int:
    """Copy a text byte for byte; return the number of bytes done so far over all splits."""
    blank = True
    while block := text.read(BLOCK):
        blank = blank and not block.strip()
        file.write(block)
        done += len(block)
        on_progress(done, total)
    if blank:
        raise UserError(f"{name} has no text; use --local PATH with one that has")
    return done


def _split_documents(source: Path, max_bytes: int | None, files: dict[str, BinaryIO], on_progress: OnProgress) -> None:
    """Decompress an xz stream of documents and distribute them over the splits."""
    size = source.stat().st_size
    written, number = 0, 0
    with open(source, "rb") as archive, open_xz(archive) as text:
        for number, document in enumerate(_documents(iter(partial(text.readline, LONGEST_DOCUMENT), b""), source)):
            split = split_of_document(number)
            file = files[split]
            block = b"\n" + document if file.tell() else document
            if max_bytes is not None and written + len(block) > max_bytes:
                break
            file.write(block)
            written += len(block)
            if split != "train":  # often enough to be seen, and rarely enough to cost nothing
                on_progress(*((archive.tell(), size) if max_bytes is None else (written, max_bytes)))
    if empty := [split for split, file in files.items() if not file.tell()]:
        limit = "" if max_bytes is None else f" within --max-bytes {max_bytes}"
        raise UserError(
            f"{source} has too little text{limit} for {' and '.join(empty)}; "
            f"at least {DOCUMENTS_A_ROUND} documents are needed, about 3 MB"
        )


def split_of_document(number: int) -> str:
    """Return the split of document `number`, counted from 0 at the beginning of the corpus."""
    return {DOCUMENTS_A_ROUND - 2: "valid", DOCUMENTS_A_ROUND - 1: "test"}.get(number % DOCUMENTS_A_ROUND, "train")


def _documents(lines: Iterable[bytes], source: "Path | str" = "the text") -> Iterator[bytes]:
    """Join lines to documents. Blank lines separate documents and belong to none; every line ends with a newline.

    Raises:
        UserError: if a document is so long that it is none.
    """
    document = bytearray()
    for line in lines:
        if len(document) + len(line) >= LONGEST_DOCUMENT:
            raise UserError(
                f"{source} has more than {LONGEST_DOCUMENT >> 20} MiB without a blank line; give text with a blank "
                "line between documents"
            )
        if line.strip():
            document += line.rstrip(b"\n") + b"\n"
        elif document:
            yield bytes(document)
            document.clear()
    if document:
        yield bytes(document)
