"""Sources of text: given files, Python's own documentation, or a public corpus."""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.progress import Display
from fairseq_hash.provenance import sha256_of_file

from .corpora import Corpus, fetch_text
from .embedded import write_embedded_corpus
from .text import check_files

TEXT_WORK = 10.0


@dataclass(frozen=True)
class GivenText:
    """The user's text files. `corpus` is the name that the record gives their text."""

    files: dict[str, list[Path]]
    corpus: str = "text"
    expected_tokens = None

    def identity(self) -> dict[str, Any]:
        """Return the files' SHA-256, by split. Raises `UserError` if a file is missing or empty."""
        for paths in self.files.values():
            check_files(paths)
        return {
            "corpus": self.corpus,
            **{split: [sha256_of_file(path) for path in paths] for split, paths in self.files.items()},
        }

    def fetch(self, folder: Path, display: Display) -> dict[str, list[Path]]:
        """Return the files as they are."""
        return self.files


@dataclass(frozen=True)
class EmbeddedText:
    """The documentation that comes with Python."""

    expected_tokens = None

    def identity(self) -> dict[str, Any]:
        """Return the version of Python, which decides the text."""
        return {"corpus": "embedded", "python": platform.python_version()}

    def fetch(self, folder: Path, display: Display) -> dict[str, list[Path]]:
        """Write the text."""
        display.begin("text of Python's documentation", TEXT_WORK)
        paths = write_embedded_corpus(folder, lambda done, total: display.advance(done / total, f"{done:,} modules"))
        display.end(f"written to {folder}")
        return {split: [path] for split, path in paths.items()}


@dataclass(frozen=True)
class PublicText:
    """A public corpus, downloaded or from a local path; its archive and text stay in `downloads`."""

    corpus: Corpus
    downloads: Path
    local: "Path | None"
    max_bytes: "int | None"
    words: bool

    @property
    def expected_tokens(self) -> "dict[str, int] | None":
        """The published numbers, if the text is cut into words."""
        return self.corpus.expected_tokens if self.words else None

    def identity(self) -> dict[str, Any]:
        """Return the corpus, how much of it is used, and the size and date of a local copy."""
        if self.local and not self.local.exists():
            raise UserError(f"--local {self.local} does not exist; give {self.corpus.archive} or its unpacked files")
        local = None
        if self.local:
            files = sorted(self.local.iterdir()) if self.local.is_dir() else [self.local]
            local = [[path.name, path.stat().st_size, path.stat().st_mtime] for path in files]
        return {"corpus": self.corpus.name, "local": local, "max_bytes": self.max_bytes}

    def fetch(self, folder: Path, display: Display) -> dict[str, list[Path]]:
        """Download the archive if it is missing, and unpack it."""
        display.begin(f"text of {self.corpus.name}", TEXT_WORK)

        def show(phase: str, done: int, total: "int | None") -> None:
            of_total = f" of {total / 1e6:,.0f}" if total else ""
            # A download of unknown size does not move the bar.
            display.advance(done / total if total else 0.0, f"{phase}: {done / 1e6:,.0f}{of_total} MB")

        paths = fetch_text(self.corpus, self.downloads / self.corpus.name, self.local, self.max_bytes, show)
        display.end(f"{self.corpus.licence}; in {self.downloads / self.corpus.name}")
        return {split: [path] for split, path in paths.items()}


# A corpus. `identity` tells it from others (JSON-ready); `fetch` returns its files by split, and writes to the folder
# those that are not there yet. `expected_tokens`: the published numbers by split (words and line ends), None without.
Source = GivenText | EmbeddedText | PublicText
