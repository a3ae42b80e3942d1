"""What README and docs tell people to write into a checkout is none of its files."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# The words after these name what a command writes, or text that people bring.
WRITES = r"(?:--out|--save-dir|--destdir|--html|--json|--tensorboard-logdir|--site-dir|--to hf|-m venv|>|mkdir -p)"
BRINGS = r"(?:--train|--valid|--test)"
pytestmark = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs git and a checkout"
)


def is_ignored(path):
    done = subprocess.run(["git", "check-ignore", "-q", "--no-index", path], cwd=ROOT)
    return done.returncode == 0


def written(page):
    """The paths that commands in a page's blocks and lines of code write, relative to the checkout."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    text = re.sub(r"^```mermaid\n.*?^```", "", text, flags=re.M | re.S)  # its arrows write nothing
    codes = [*re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S), *re.findall(r"`([^`\n]+)`", text)]
    found = set()
    for code in codes:
        found |= set(re.findall(rf"{WRITES} +([\w./-]+)", code))
        found |= {word for word in re.findall(rf"{BRINGS} +([\w./-]+)", code) if "." in word}
    # Capitals stand for what people put in. A file of the project is one that people are told to renew.
    kept = [word for word in found if word[0] not in "/-." and not re.search("DIR|FILE", word)]
    return sorted(word for word in kept if re.search("[a-z]", word) and not (ROOT / word).is_file())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_writes_is_ignored(page):
    assert [path for path in written(page) if not is_ignored(path) and not is_ignored(f"{path}/")] == []


def test_the_pages_are_read():
    paths = {path for page in PAGES for path in written(page)}
    assert {"data/mine", "train.txt", "test.txt.xz", "comparison", "exported/hash"} <= paths


def test_no_file_of_the_project_is_ignored():
    listed = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout == ""
