"""scripts/setup.sh for real, on a copy of the project whose packages are empty stand-ins: no index, no compiler."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.path.realpath(sys._base_executable)
TAG = "cp{}{}".format(*sys.version_info[:2])

# The stand-in project builds itself without setuptools. Where a file `hold` lies in the project it waits in the middle.
BACKEND = """
import time, zipfile
from pathlib import Path

def build_editable(folder, config_settings=None, metadata_directory=None):
    Path("reached").touch()
    while Path("hold").exists():
        time.sleep(0.05)
    name = "fairseq_hash-0.1.0-py3-none-any.whl"
    info = "fairseq_hash-0.1.0.dist-info"
    with zipfile.ZipFile(Path(folder, name), "w") as wheel:
        wheel.writestr("fairseq_hash.pth", str(Path.cwd()))
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: fairseq_hash\\nVersion: 0.1.0\\n"
                       "Requires-Dist: torch\\nProvides-Extra: test\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""


def write_wheel(folder, name, version, tag):
    """Write a wheel of a package that holds an empty module and a data file."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "")
        wheel.writestr(f"{name}/deep/data.txt", "data")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{info}/RECORD", "")


def make_project(folder):
    """Lay out the project's own set-up files over stand-in packages."""
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "scripts" / "pins-py311.txt").write_text("torch==2.13.0\n")
    (folder / "fairseq_hash").mkdir()
    (folder / "fairseq_hash" / "provenance.py").write_text('__version__ = "0.1.0"\n')
    (folder / "backend.py").write_text(BACKEND)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "fairseq_hash"\n\n[tool.ruff]\n'
    )
    for version in ("2.13.0", "2.14.0"):
        write_wheel(folder / "index", "torch", version, "py3-none-any")
    write_wheel(folder / ".venv" / "wheels", "fairseq", fairseq_version(), f"{TAG}-none-any")
    (folder / "use.sh").write_text('. "$(dirname "$0")/scripts/setup.sh"\necho "ready $VENV_PYTHON"\n"$@"\n')
    return folder


def fairseq_version():
    (version,) = re.findall(r"rebuilt\.\d+", (ROOT / "scripts" / "build_fairseq.py").read_text())[:1]
    return f"0.12.2+{version}"


def environment(project, **changes):
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "FAIRSEQ_HASH_"))}
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": (project / "index").as_uri(), "PIP_CONFIG_FILE": os.devnull}
    return {**variables, "PYTHON": PYTHON, **index, **changes}


def start(project, *command, **changes):
    streams = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    # Where these tests run in the background, they ignore Ctrl-C, and so would what they start.
    alone = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    words = ["bash", str(project / "use.sh"), *command]
    return subprocess.Popen(words, cwd="/", env=environment(project, **changes), **streams, **alone)


def use(project, *command, **changes):
    """Run the stand-in script that sources setup.sh; return its exit status, standard output and standard error."""
    process = start(project, *command, **changes)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def assert_made(result, project, reason):
    status, output, errors = result
    assert status == 0, errors
    assert output == f"ready {project}/.venv/bin/python\n"
    assert f"setup: making the environment in {project}/.venv: {reason}" in errors
    assert all(line.startswith("setup: ") for line in errors.splitlines()), errors  # pip's own words are in a file
    assert "Successfully installed" in (project / ".venv" / "logs" / "packages.txt").read_text()
    imports = "import torch, fairseq, fairseq_hash"
    subprocess.run([project / ".venv" / "bin" / "python", "-c", imports], cwd="/", check=True)


def assert_untouched(result, project):
    assert result == (0, f"ready {project}/.venv/bin/python\n", "")


def test_one_environment_through_its_life(tmp_path):
    """In a path with spaces, run from another folder."""
    project = make_project(tmp_path / "a project")
    is_mended_by_the_run_that_waited(project)
    is_not_replaced_while_it_is_used(project)
    is_made_anew_for_another_torch_and_a_missing_file(project)


def is_mended_by_the_run_that_waited(project):
    (project / "hold").touch()
    first = start(project)
    wait_for(project / "reached")
    second = start(project)
    assert second.stderr.readline() == "setup: another set-up of this folder is running; waiting for it\n"
    with pytest.raises(subprocess.TimeoutExpired):  # it waits for as long as the first one runs
        second.wait(timeout=2)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    # The second goes on once the first is dead, and finds what the first left behind.
    (project / "hold").unlink()
    output, errors = second.communicate(timeout=120)
    assert_made((second.returncode, output, errors), project, "the last set-up was not completed")
    assert_untouched(use(project), project)
    # PYTHON and torch need not be given again, whichever Python is first on PATH.
    assert_untouched(use(project, PYTHON=""), project)


def is_not_replaced_while_it_is_used(project):
    (project / "stop").touch()
    user = start(project, "bash", "-c", f"while [ -e '{project}/stop' ]; do sleep 0.05; done")
    assert user.stdout.readline().startswith("ready")
    assert_untouched(use(project), project)
    status, output, errors = use(project, FAIRSEQ_HASH_TORCH="2.14.0")
    assert (status, output) == (1, "")
    assert errors == (
        "setup: .venv must be made anew (it was made with torch 2.13.0), but another script uses it; wait for its end\n"
    )
    (project / "stop").unlink()
    assert user.wait(timeout=300) == 0


def is_made_anew_for_another_torch_and_a_missing_file(project):
    site = next(project.glob(".venv/lib/python3*/site-packages"))
    (site / "torch" / "deep" / "data.txt").unlink()
    assert_made(use(project, FAIRSEQ_HASH_TORCH="2.14.0"), project, "it was made with torch 2.13.0")
    assert (site / "torch-2.14.0.dist-info").is_dir()
    assert_untouched(use(project), project)

    (site / "torch" / "deep" / "data.txt").unlink()
    (project / "reached").unlink()
    (project / "hold").touch()
    process = start(project)
    wait_for(project / "reached")
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=300)
    assert process.returncode != 0 and output == ""
    assert f"setup: making the environment in {project}/.venv: torch/deep/data.txt is missing" in errors
    assert errors.splitlines()[-1] == "setup: interrupted; the next run makes the environment anew"
    (project / "hold").unlink()


def test_a_failing_pip_and_a_moved_folder(tmp_path):
    project = make_project(tmp_path / "project")
    status, output, errors = use(project, FAIRSEQ_HASH_TORCH="2.99.0")
    assert (status, output) == (1, "")
    assert f"setup: making the environment in {project}/.venv: there is none yet" in errors
    assert "No matching distribution found for torch==2.99.0" in errors
    assert errors.splitlines()[-1] == (
        f"setup: the step `packages` failed; its last lines stand above, all are in {project}/.venv/logs/packages.txt"
    )
    assert "Traceback" not in errors
    moved = project.rename(tmp_path / "moved")
    assert_made(use(moved, FAIRSEQ_HASH_TORCH="2.14.0"), moved, "the last set-up was not completed")


def refusal(project, **changes):
    """Return the one line with which a set-up refuses, and check that it left nothing behind."""
    status, output, errors = use(project, **changes)
    assert (status, output) == (1, "")
    assert not (project / ".venv" / "bin").exists()
    (line,) = errors.splitlines()
    return line


def fake_command(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def tools(tmp_path):
    """A folder for PATH that holds what setup.sh needs, and neither Python nor a compiler."""
    (tmp_path / "tools").mkdir()
    for name in ("bash", "dirname", "mkdir"):
        (tmp_path / "tools" / name).symlink_to(shutil.which(name))
    return tmp_path / "tools"


@pytest.mark.parametrize("text", ["exit 1", "exec nothing-there"])
def test_refuses_a_wrong_python(tmp_path, text):
    """A Python out of range fails the check of its version as `exit 1` does."""
    fake_command(tmp_path / "bin", "python", text)
    line = refusal(make_project(tmp_path / "project"), PYTHON=str(tmp_path / "bin" / "python"))
    wrong = f"PYTHON={tmp_path}/bin/python is not a Python 3.10 to 3.13 that runs"
    assert line == f"setup: {wrong}; set it to one, or unset it"


def test_refuses_a_machine_without_python(tmp_path, tools):
    line = refusal(make_project(tmp_path / "project"), PYTHON="", PATH=str(tools))
    assert line == "setup: found no Python 3.10 to 3.13 on PATH; install one, or set PYTHON to the path of one"


def test_passes_over_a_stub_that_does_not_run(tmp_path, tools):
    """A version manager's stub for a Python that is not installed; then the missing compiler is what is wrong."""
    fake_command(tools, "python3", "echo 'python3: command not found' >&2; exit 127")
    (tools / f"python3.{sys.version_info[1]}").symlink_to(PYTHON)
    project = make_project(tmp_path / "project")
    shutil.rmtree(project / ".venv" / "wheels")
    line = refusal(project, PYTHON="", PATH=str(tools), CXX="", CC="")
    assert line == "setup: no C++ compiler on PATH; install g++ or clang++, or set CXX"


@pytest.mark.parametrize(
    ("torch", "message"),
    [("newest", "is not a version; give one such as 2.13.0"), ("2.10.1", "is too old; give 2.11 or later")],
)
def test_refuses_a_wrong_torch(tmp_path, torch, message):
    line = refusal(make_project(tmp_path / "project"), FAIRSEQ_HASH_TORCH=torch)
    assert line == f"setup: FAIRSEQ_HASH_TORCH={torch} {message}, or unset it"


def test_leaves_a_foreign_environment_alone(tmp_path):
    project = make_project(tmp_path / "project")
    package = project / ".venv" / "lib" / "python3.11" / "site-packages" / "numpy-2.0.0.dist-info"
    package.mkdir(parents=True)
    line = refusal(project)
    assert line == f"setup: {project}/.venv holds an environment that is not this project's; move it away or delete it"
    assert package.is_dir()


def test_one_range_of_pythons():
    """The set-up's shell, the recipe and the package's metadata name the same Pythons."""
    assert "(3, 10) <= sys.version_info[:2] <= (3, 13)" in (ROOT / "scripts" / "setup.sh").read_text()
    assert "PYTHONS = ((3, 10), (3, 13))" in (ROOT / "scripts" / "build_fairseq.py").read_text()
    assert 'requires-python = ">=3.10,<3.14"' in (ROOT / "pyproject.toml").read_text()
