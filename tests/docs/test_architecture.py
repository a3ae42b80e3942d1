"""The rooms of docs/architecture.md are those of the package, and imports go down only, as pyproject.toml says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("importlinter", reason="import-linter is not installed: pip install -e '.[test]'")


def lint(folder):
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", program, "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_imports_go_down_only():
    done = lint(ROOT)
    assert done.returncode == 0 and " 0 broken." in done.stdout, done.stdout + done.stderr


def test_an_arrow_upwards_is_found(tmp_path):
    """Late imports, too."""
    names = re.findall(r'^    "(\w+)",$', (ROOT / "pyproject.toml").read_text().partition("layers = [")[2], re.M)
    for name in ["", *dict.fromkeys(names)]:
        (tmp_path / "fairseq_hash" / name).mkdir()
        (tmp_path / "fairseq_hash" / name / "__init__.py").touch()
    for name in ("layer", "routers", "dispatchers", "routing_stats", "kernels"):
        (tmp_path / "fairseq_hash" / "moe" / f"{name}.py").touch()
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    assert lint(tmp_path).returncode == 0
    (tmp_path / "fairseq_hash" / "moe" / "experts.py").write_text("def f():\n    import fairseq_hash.options\n")
    done = lint(tmp_path)
    assert done.returncode == 1 and "fairseq_hash.moe is not allowed to import fairseq_hash.options" in done.stdout


def test_the_page_names_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {path.parent.name for path in (ROOT / "fairseq_hash").glob("*/__init__.py")}
    assert set(re.findall(r'^    (\w+)\["', page, re.M)) == rooms
    told = {name for row in re.findall(r"^\| (`.*?`) \|", page, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert rooms <= told
