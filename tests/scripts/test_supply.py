"""What the project is made of: each version has a reason and a licence, and its builds can be repeated."""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
PINS = ROOT / "scripts" / "pins-py311.txt"


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


licences = script("licences")


def test_every_bound_has_its_reason_beside_it():
    lines = (ROOT / "pyproject.toml").read_text().partition("[tool.ruff]")[0].splitlines()
    bounds = [number for number, line in enumerate(lines) if re.search(r'"[^"]*[<>=~]=?\d[^"]*"', line)]
    assert len(bounds) == 4
    for number in bounds:
        assert lines[number - 1].strip().startswith("# Why: "), f"{lines[number]} has no reason above it"
    assert PINS.read_text().startswith("# Why: ")
    setup = (ROOT / "scripts" / "setup_env.py").read_text()
    for name in ("PINNED_PYTHON", "TORCH", "OLDEST_TORCH"):
        assert re.search(rf"^{name} = .+  # .+", setup, re.MULTILINE), f"{name} has no reason beside it"


def test_every_pinned_package_is_in_the_list_of_licences():
    text = (ROOT / "docs" / "licences.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    listed = {licences.plain(name): (version, licence) for name, version, licence in rows[1:]}
    wanted = licences.pinned(PINS.read_text())
    assert len(wanted) > 100
    assert {name: version for name, (version, _) in listed.items() if name in wanted} == wanted
    assert "fairseq" in listed
    assert not [name for name, (_, licence) in listed.items() if licence in ("", "not stated")]


def test_every_pin_takes_every_python_3_11():
    """The pins are used on any of them; Debian 12 has 3.11.2. A package says which it takes, if it is installed."""
    needs = {}
    for name, version in licences.pinned(PINS.read_text()).items():
        with contextlib.suppress(metadata.PackageNotFoundError):
            found = metadata.metadata(name)
            needs[name] = (found["Requires-Python"] or "") if found["Version"].startswith(version) else ""
    assert len(needs) > 20
    assert not {name: of for name, of in needs.items() if not SpecifierSet(of).contains("3.11.0")}


def stated(**entries):
    package = metadata.PathDistribution(Path())
    lines = ["Metadata-Version: 2.4", "Name: x", "Version: 1+local"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, values in entries.items() for value in values]
    package.read_text = lambda name: "\n".join(lines) + "\n\n"
    return package


@pytest.mark.parametrize(
    ("entries", "licence"),
    [
        ({"License_Expression": ["MIT OR X"], "License": ["other"]}, "MIT OR X"),
        ({"License": ["BSD"], "Classifier": ["License :: OSI Approved :: MIT License"]}, "BSD"),
        ({"License": ["Copyright (c) 2020 " + "and so on " * 30], "Classifier": ["License :: A :: B"]}, "B"),
        ({"License": ["UNKNOWN"], "Classifier": ["License :: A", "License :: B", "Topic :: C"]}, "A, B"),
        ({}, "not stated"),
    ],
)
def test_the_licence_that_a_package_states(entries, licence):
    assert licences.licence_of(stated(**entries)) == licence
    assert f"| x | 1 | {licence} |" in licences.listed([stated(**entries)])


def built(folder, out, umask, zone):
    """Build the commit that is checked out in a folder; return the SHA-256 of what was made by name."""
    environment = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"} | {"TZ": zone}
    command = [sys.executable, str(folder / "scripts" / "build_dist.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, umask=umask)
    assert done.returncode == 0, done.stderr
    sums = dict(line.split("  ")[::-1] for line in done.stdout.splitlines())
    assert sums == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
    return sums


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not in a checkout")
def test_builds_are_the_same_elsewhere_and_later(tmp_path):
    pytest.importorskip("setuptools", reason="setuptools is not installed: pip install 'setuptools>=77'")
    other = tmp_path / "another place"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, other], check=True)
    (other / "fairseq_hash" / "not_of_the_commit.py").write_text("1")
    shutil.copy(ROOT / "scripts" / "build_dist.py", other / "scripts")  # that of the commit may be another
    one = built(ROOT, tmp_path / "one", 0o022, "UTC")
    assert built(other, tmp_path / "other", 0o077, "Asia/Tokyo") == one and len(one) == 2
    (wheel,) = (tmp_path / "one").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top.partition("-")[0] for top in tops} == {"fairseq_hash"}
    endings = {Path(name).suffix for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert endings == {".py", ".typed", ".yaml", ".css", ".js", ".md", ""}  # "": the licence of what reports bring
    (archive,) = (tmp_path / "one").glob("*.tar.gz")
    with tarfile.open(archive) as entries:
        assert {(entry.uid, entry.gid, entry.uname) for entry in entries.getmembers()} == {(0, 0, "")}


def test_a_list_for_machines_is_valid(tmp_path):
    pytest.importorskip("cyclonedx_py", reason="cyclonedx-bom is not installed: pip install cyclonedx-bom")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    command = [sys.executable, "-m", "cyclonedx_py", "requirements", PINS, "--output-reproducible"]
    subprocess.run([*command, "-o", tmp_path / "sbom.json"], check=True, capture_output=True)
    text = (tmp_path / "sbom.json").read_text()
    content = json.loads(text)
    assert len(text) < 500_000
    assert JsonStrictValidator(SchemaVersion.from_version(content["specVersion"])).validate_str(text) is None
    found = {licences.plain(one["name"]): one["version"] for one in content["components"]}
    assert found == licences.pinned(PINS.read_text())
