#!/usr/bin/env python3
"""Build the wheel and the source archive of the commit that is checked out: the same bytes anywhere and at any time.

    python scripts/build_dist.py --out dist

The files are those of the commit, whatever else lies in the checkout, and all times in the archives are the commit's
(SOURCE_DATE_EPOCH, if that is not set). setuptools, with its version, must be the same; it is the only tool. The
SHA-256 of both files are printed.
"""

import argparse
import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
# What is packaged: nothing else goes into the source archive, either.
PARTS = ("fairseq_hash", "data_prep", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def git(*words: str) -> bytes:
    """Return what git prints about this checkout."""
    return subprocess.run(["git", "-C", str(ROOT), *words], check=True, stdout=subprocess.PIPE).stdout


def exported(commit: str, folder: Path, epoch: int) -> Path:
    """Write the files of a commit to a folder, with plain permissions and one time, as setuptools copies both."""
    with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", commit, *PARTS))) as archive:
        # Python 3.11.0 to 3.11.3 have no filters; the archive is our own.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.utime(path, (epoch, epoch))
    return folder


def build(kind: str, source: Path, out: Path, epoch: int) -> Path:
    """Build a `wheel` or an `sdist`; return its path."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "PYTHONHASHSEED": "0", "TZ": "UTC"}
    command = [sys.executable, "-c", PROGRAM, f"build_{kind}", str(out)]
    done = subprocess.run(command, cwd=source, env=environment, umask=0o022, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"build_dist: setuptools cannot build the {kind}: {done.stderr.strip().splitlines()[-1]}")
    return out / done.stdout.splitlines()[-1]


def repack(archive: Path, epoch: int) -> None:
    """Write a source archive anew, in the order of names, with one time and without the names of who built it."""
    content = io.BytesIO()
    with tarfile.open(archive) as old, tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as new:
        for entry in sorted(old.getmembers(), key=lambda one: one.name):
            entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname, entry.pax_headers = epoch, 0, 0, "", "", {}
            entry.mode = 0o755 if entry.isdir() else 0o644
            new.addfile(entry, old.extractfile(entry) if entry.isfile() else None)
    with archive.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=epoch) as packed:
        packed.write(content.getvalue())


def main() -> int:
    """Build both and print their SHA-256."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for both, made if missing")
    parser.add_argument("--commit", default="HEAD", help="what is built (default: %(default)s)")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or git("log", "-1", "--format=%ct", arguments.commit))
    for kind in ("wheel", "sdist"):
        # A source of its own for each: a build leaves files behind.
        with tempfile.TemporaryDirectory() as folder:
            made = build(kind, exported(arguments.commit, Path(folder), epoch), out, epoch)
        if kind == "sdist":
            repack(made, epoch)
        print(f"{hashlib.sha256(made.read_bytes()).hexdigest()}  {made.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
