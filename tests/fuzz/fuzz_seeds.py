"""Real files for mutations: runs, checkpoints and data of an earlier version, which `tests/end_to_end` keeps."""

import functools
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = ROOT / "tests" / "end_to_end" / "before_the_move" / "runs.tar.xz"
SPLITS = ("train", "valid", "test")


@functools.cache
def kept() -> dict[str, bytes]:
    """Return the kept files by their path."""
    with tarfile.open(ARCHIVE) as archive:
        return {one.name: archive.extractfile(one).read() for one in archive.getmembers() if one.isfile()}


def run_files(name: str) -> dict[str, bytes]:
    """Return the files of a kept run (dense, hash or switch) by their path in its folder."""
    start = f"runs/{name}/"
    return {path.removeprefix(start): content for path, content in kept().items() if path.startswith(start)}


@functools.cache
def symbols() -> list[str]:
    """Return the symbols of the kept data's dictionary."""
    words = [line.rpartition(" ")[0] for line in kept()["data/dict.txt"].decode().splitlines()]
    return ["<s>", "<pad>", "</s>", "<unk>", *words]
