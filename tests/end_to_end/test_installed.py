"""Installed from a wheel, from a source archive or in place: everything works from any folder, without a checkout.

The environments here borrow the libraries of the one that runs the tests, and have their own fairseq_hash.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from hydra_configs import needs_current_hydra
from prepared import SPLITS, arguments, write_text

pytest.importorskip("setuptools", reason="setuptools is not installed: pip install 'setuptools>=77'")
ROOT = Path(__file__).resolve().parents[2]
PARTS = ("fairseq_hash", "data_prep", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def run(*words, check=True, cwd="/", **more):
    """Run a command where no checkout is; return the finished process with its output as text."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = list(map(str, words))
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, cwd=cwd, env={**kept, **more})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is packaged: building writes into its folder."""
    folder = tmp_path_factory.mktemp("a source")
    unwanted = shutil.ignore_patterns("__pycache__")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=unwanted)
        else:
            shutil.copy(ROOT / part, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


def build_wheel(source, folder):
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index")
    run(*pip, "-w", folder, source)
    (made,) = folder.glob("*.whl")
    return made


def environment(folder, *what):
    """Make an environment with fairseq_hash and all libraries of this one; return the folder of its commands."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index")
    run(*pip, "--no-build-isolation", *what, PYTHONPATH=sysconfig.get_path("purelib"))
    (site,) = folder.glob("lib/python3*/site-packages")
    # Of a folder that such a line adds, .pth files are not read: this environment's own fairseq_hash stays out.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("an environment") / "env", wheel)


@pytest.fixture(scope="module")
def data(installed, tmp_path_factory):
    """Data that the installed command made, in worker processes of its own."""
    folder = tmp_path_factory.mktemp("some data")
    files = write_text(folder / "text")
    run(installed / "fairseq-hash", "data", *arguments(files, folder / "data", "--vocab-size", "300"))
    assert {f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx")} <= set(os.listdir(folder / "data"))
    return folder / "data"


def files_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_wheel_holds_everything_in_one_package(source, wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"fairseq_hash"}
    for part, place in (("fairseq_hash", ""), ("data_prep", "fairseq_hash/"), ("configs", "fairseq_hash/")):
        missing = {f"{place}{part}/{name}" for name in files_below(ROOT / part) if "__pycache__" not in name} - names
        assert not missing, f"setup.py leaves out {sorted(missing)[:5]}"


def test_a_source_archive_gives_the_same_wheel(source, wheel, tmp_path):
    program = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", program, tmp_path, cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = build_wheel(unpacked, tmp_path / "wheel")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_the_package_says_where_it_is(installed):
    folder = Path(run(installed / "fairseq-hash", "user-dir").stdout.strip())
    assert folder.is_relative_to(installed.parent) and (folder / "lm" / "model.py").is_file()
    configs = Path(run(installed / "fairseq-hash", "user-dir", "--configs").stdout.strip())
    assert configs.is_relative_to(folder) and files_below(configs) == files_below(ROOT / "configs")


@needs_current_hydra
def test_experiments_are_found(installed):
    said = run(installed / "fairseq-hash", "plan", "--config-name", "reddit/hash_1x64").stdout
    assert said.startswith("reddit/hash_1x64\n") and "Parameters" in said
    assert "laptop/hash\n" in run(installed / "fairseq-hash", "plan", "--list").stdout


def test_help_of_data(installed):
    assert "CORPUS" in run(installed / "fairseq-hash", "data", "--help").stdout
    refused = run(installed / "fairseq-hash", "data", "embedded", "--out", "/", check=False)
    assert refused.returncode == 1 and refused.stderr.startswith("fairseq-hash: --out / ")
    assert refused.stderr.count("\n") == 1
    assert "CORPUS" in run(installed / "python", "-m", "fairseq_hash.data_prep", "--help").stdout


def test_trains_by_its_folder(installed, data, tmp_path):
    folder = run(installed / "fairseq-hash", "user-dir").stdout.strip()
    words = "--task language_modeling --arch hash_transformer_lm_tiny --router hash --num-experts 4 --sparse-layers 1 "
    words += "--criterion hash_moe --tokens-per-sample 16 --max-tokens 64 --optimizer adam --lr 1e-3 --max-update 2"
    places = (data, "--user-dir", folder, "--save-dir", tmp_path)
    run(installed / "python", "-m", "fairseq_cli.train", *places, *words.split(), "--cpu", "--num-workers", "0")
    assert (tmp_path / "checkpoint_last.pt").is_file()


@needs_current_hydra
def test_trains_by_its_configurations(installed, data, tmp_path):
    configs = run(installed / "fairseq-hash", "user-dir", "--configs").stdout.strip()
    words = "cluster=cpu optimization.max_update=2 optimization.update_freq=[1] task.tokens_per_sample=16 "
    words += (
        "dataset.max_tokens=64 dataset.num_workers=0 criterion.update_freq_ranks=0 checkpoint.save_interval_updates=0"
    )
    words = [*words.split(), f"task.data={data}", f"hydra.run.dir={tmp_path}/run"]
    chosen = ("--config-dir", configs, "--config-name", "laptop/hash")
    run(installed / "python", "-m", "fairseq_cli.hydra_train", *chosen, *words)
    assert (tmp_path / "run" / "checkpoint_last.pt").is_file()


def test_an_editable_installation_knows_the_checkout(source, tmp_path):
    commands = environment(tmp_path / "env", "--editable", source)
    assert run(commands / "fairseq-hash", "user-dir").stdout.strip() == str(source / "fairseq_hash")
    assert run(commands / "fairseq-hash", "user-dir", "--configs").stdout.strip() == str(source / "configs")
    assert "laptop/hash\n" in run(commands / "fairseq-hash", "plan", "--list").stdout
    assert "CORPUS" in run(commands / "fairseq-hash", "data", "--help").stdout
    program = "import fairseq_hash.data_prep.cli as cli; print(cli.__file__)"
    assert run(commands / "python", "-c", program).stdout.strip() == str(source / "data_prep" / "cli.py")
    assert "CORPUS" in run(commands / "python", "-m", "data_prep", "--help", cwd=source).stdout
