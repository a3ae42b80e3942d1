"""Where a result comes from: code version, commit, library versions, hardware and date."""

import hashlib
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from fairseq_hash.core.json_text import parse_json

__version__ = "0.1.0"

DATA_RECORD = "provenance.json"  # what data_prep says of the data, in their folder

LIBRARIES = ("torch", "fairseq", "fairscale", "hydra-core", "omegaconf", "numpy", "sentencepiece")


def provenance() -> dict[str, object]:
    """Return a JSON-ready record of the code, the libraries and the machine that make a result.

    Keys: `fairseq_hash` (version), `commit` (hash, with `-dirty` where tracked files differ; None outside a checkout),
    `python`, one key a library (None where it is not installed), `processor`, `cores` (usable ones), `gpus` (names),
    `platform` and `date` (UTC, ISO 8601, seconds).
    """
    return {
        "fairseq_hash": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "processor": _processor(),
        "cores": usable_cores(),
        "gpus": _gpus(),
        "platform": platform.platform(terse=True),
        "date": now(),
    }


def listed(facts: Mapping[str, object]) -> list[str]:
    """Return a record as the lines of a Markdown list, without what is None or an empty list."""
    return [f"- {name}: {value}" for name, value in facts.items() if value not in (None, [])]


def now() -> str:
    """Return the time: UTC, ISO 8601, seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit() -> str | None:
    """Return the commit of the checkout this package runs from, `-dirty` appended where tracked files differ."""
    folder = Path(__file__).resolve().parent
    try:
        tracked = ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name]
        # An installed copy can lie inside some other project's checkout (a virtual environment): not our commit.
        subprocess.run(tracked, check=True, capture_output=True)
        describe = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def corpus_of(data: Path) -> "str | None":
    """Return the corpus of a folder of prepared data by its name, None if data_prep did not record it."""
    try:
        corpus = parse_json((data / DATA_RECORD).read_text(encoding="utf-8"))["identity"]["corpus"]
        return corpus if isinstance(corpus, str) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_gigabytes() -> float:
    """Return the most memory this process has had, in GB (10^9 bytes): of its GPU where it uses one, else resident."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux, bytes on macOS
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as hexadecimal digits, reading it in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    try:
        import torch
    except ModuleNotFoundError:
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
