"""scripts/setup_env.py: what it takes for a whole environment, and when it refuses to make one."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.path.realpath(sys._base_executable)


@pytest.fixture
def setup_env(tmp_path, monkeypatch):
    """The module scripts/setup_env.py, looking at an environment in tmp_path that is whole."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "scripts" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, path in (("VENV", ".venv"), ("STATE", ".venv/setup.json"), ("WHEELS", ".venv/wheels")):
        monkeypatch.setattr(module, name, tmp_path / path)
    package = tmp_path / ".venv" / "lib" / "python3.11" / "site-packages" / "torch-2.13.0.dist-info"
    package.mkdir(parents=True)
    (package / "RECORD").write_text('torch/__init__.py,,\n"torch/a,b.py",,\ntorch/cache.pyc,,\n../../../bin/tool,,\n')
    (package.parent / "torch").mkdir()
    (package.parent / "torch" / "__init__.py").touch()
    (package.parent / "torch" / "a,b.py").touch()
    (tmp_path / ".venv" / "bin").mkdir()
    (tmp_path / ".venv" / "bin" / "tool").touch()
    (tmp_path / ".venv" / "bin" / "python").symlink_to(PYTHON)
    state = {"complete": True, "folder": str(ROOT), "python": PYTHON, "torch": ""}
    module.write_state({**state, "requirements": module.requirements(), "packages": module.installed()})
    return module


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda venv: None, None),
        (lambda venv: (venv / "setup.json").unlink(), "there is none yet"),
        (lambda venv: (venv / "setup.json").write_text('{"complete"'), "there is none yet"),
        (lambda venv: (venv / "bin" / "python").unlink(), "its Python no longer runs"),
        (lambda venv: replace_link(venv / "bin" / "python", "/nowhere/python3"), "its Python no longer runs"),
        (lambda venv: (venv / "bin" / "tool").unlink(), "../../../bin/tool is missing"),
        (lambda venv: shutil.rmtree(site(venv) / "torch"), "torch/__init__.py is missing"),
        (lambda venv: (site(venv) / "torch" / "a,b.py").unlink(), "torch/a,b.py is missing"),
        (lambda venv: shutil.rmtree(site(venv) / "torch-2.13.0.dist-info"), "torch-2.13.0.dist-info/RECORD is missing"),
        (lambda venv: shutil.rmtree(venv / "lib"), "lib is missing"),
    ],
)
def test_finds_the_damage(setup_env, damage, reason):
    damage(setup_env.VENV)
    assert setup_env.problem(setup_env.read_state(), "") == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"complete": False}, "the last set-up was not completed"),
        ({"folder": "/elsewhere"}, "the project folder was moved or copied"),
        ({"python": "/usr/bin/python9"}, "it was made with another Python, /usr/bin/python9"),
        ({"torch": "2.11.0"}, "it was made with torch 2.11.0"),
        ({"requirements": "0"}, "the requirements changed"),
    ],
)
def test_finds_what_the_environment_was_made_for(setup_env, change, reason):
    assert setup_env.problem({**setup_env.read_state(), **change}, "") == reason


def site(venv):
    return venv / "lib" / "python3.11" / "site-packages"


def replace_link(path, target):
    path.unlink()
    path.symlink_to(target)


def test_requirements_follow_what_is_installed_only(setup_env, tmp_path, monkeypatch):
    before = setup_env.requirements()
    for name in ("pyproject.toml", "fairseq_hash/provenance.py", "scripts/pins-py311.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    monkeypatch.setattr(setup_env, "PINS", tmp_path / "scripts" / "pins-py311.txt")
    assert setup_env.requirements() == before
    project = tmp_path / "pyproject.toml"
    project.write_text(project.read_text().replace("line-length = 120", "line-length = 100"))
    assert setup_env.requirements() == before
    for path, old, new in (
        (project, '"rich"', '"rich", "tqdm"'),
        (tmp_path / "fairseq_hash" / "provenance.py", '__version__ = "', '__version__ = "9'),
        (setup_env.PINS, "torch==", "torch==9"),
    ):
        original = path.read_text()
        path.write_text(original.replace(old, new))
        assert setup_env.requirements() != before, path
        path.write_text(original)


def test_refuses_without_ensurepip_or_room(setup_env, monkeypatch):
    found = importlib.util.find_spec
    tag = "cp{}{}".format(*sys.version_info[:2])
    setup_env.WHEELS.mkdir()
    (setup_env.WHEELS / f"fairseq-{setup_env.build_fairseq.VERSION}-{tag}-none-any.whl").touch()
    setup_env.check_machine()
    usage = setup_env.shutil.disk_usage(ROOT)._replace(free=2_000_000_000)
    monkeypatch.setattr(setup_env.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(setup_env.SetupError, match="^2.0 GB free for .*; at least 3 GB are needed"):
        setup_env.check_machine()
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", lambda name: name != "ensurepip" and found(name))
    with pytest.raises(setup_env.SetupError, match=r"has no venv or ensurepip module; install it \(python3-venv\)"):
        setup_env.check_machine()


@pytest.mark.parametrize(
    ("given", "text", "expected"),
    [
        ("", f'exec {PYTHON} "$@"', True),
        (PYTHON, f'exec {PYTHON} "$@"', False),  # PYTHON asks for another one now
        ("", "exit 1", False),  # it no longer runs
        ("", "echo 3 9", False),  # it became another version
    ],
)
def test_goes_on_with_the_python_that_was_chosen(setup_env, tmp_path, monkeypatch, given, text, expected):
    (tmp_path / "chosen").write_text(f"#!/bin/sh\n{text}\n")
    (tmp_path / "chosen").chmod(0o755)
    chosen = str(tmp_path / "chosen")
    replaced = []
    monkeypatch.setattr(setup_env.os, "execv", lambda path, arguments: replaced.append((path, arguments)))
    monkeypatch.setattr(setup_env.sys, "argv", ["setup_env.py", "--in-use", "9"])
    monkeypatch.setenv("PYTHON", given)
    setup_env.use_chosen_python({"python": chosen})
    assert replaced == ([(chosen, [chosen, "setup_env.py", "--in-use", "9"])] if expected else [])
