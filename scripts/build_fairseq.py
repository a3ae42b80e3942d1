#!/usr/bin/env python3
"""Build a fairseq 0.12.2 wheel that runs on current Python, Hydra, OmegaConf, NumPy and torch.

fairseq's last release (2022) does not import on Python 3.11 or later, and current pip refuses its pins. This program
downloads the released source, checks it, makes the few edits listed in `REWRITES` and in `open_dataclasses`, and
builds a wheel in pip's isolated environment. Nothing else is changed. It needs pip and a C++ compiler, no torch.

    python scripts/build_fairseq.py --out DIR [--sdist fairseq-0.12.2.tar.gz]

The wheel's version is `0.12.2+rebuilt.N` (see `VERSION`), so that `pip list` tells it from the stock release.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

RELEASE = "0.12.2"
VERSION = f"{RELEASE}+rebuilt.4"
SDIST_SHA256 = "34f1b18426bf3844714534162f065ab733e049597476daa35fffb4d06a92b524"
PYTHONS = ((3, 10), (3, 13))

# Python 3.11 refuses a dataclass instance as a default when its class has no hash, and `@dataclass` removes the hash
# unless told not to write `__eq__`. fairseq compares no two configurations by value.
BARE_DATACLASS = re.compile(r"^(\s*)@dataclass[ \t]*$", re.MULTILINE)
BARE_DATACLASS_COUNT = 117

# (file, text of the release, replacement, reason); each text stands in its file exactly once.
REWRITES = [
    (
        "setup.py",
        '"hydra-core>=1.0.7,<1.1"',
        '"hydra-core>=1.3"',
        "Hydra before 1.3 does not import on Python 3.11",
    ),
    (
        "setup.py",
        '"omegaconf<2.1"',
        '"omegaconf>=2.3"',
        "the metadata of every older OmegaConf is invalid to current pip",
    ),
    (
        "setup.py",
        '            "torchaudio>=0.8.0",\n',
        "",
        "only the speech tasks use it, and it pulls a build that does not match the newest torch",
    ),
    (
        "fairseq/data/token_block_dataset.py",
        "dtype=np.compat.long",
        "dtype=int",
        "NumPy 2 has no such alias; `--sample-break-mode eos` of language models needs it",
    ),
    (
        "fairseq/data/language_pair_dataset.py",
        "otypes=[np.compat.long]",
        "otypes=[int]",
        "NumPy 2 has no such alias",
    ),
    (
        "fairseq/data/data_utils.py",
        "                    np.int,\n",
        "                    int,\n",
        "NumPy 1.24 and later have no such alias",
    ),
    (
        "fairseq/modules/dynamic_crf_layer.py",
        'np.float("inf")',
        'float("inf")',
        "NumPy 1.24 and later have no such alias",
    ),
    (
        "fairseq_cli/hydra_train.py",
        '@hydra.main(config_path=os.path.join("..", "fairseq", "config"), config_name="config")\n',
        "import warnings\n\nwith warnings.catch_warnings():\n"
        '    warnings.simplefilter("ignore")\n'
        '    main = hydra.main(config_path=os.path.join("..", "fairseq", "config"), config_name="config")\n\n\n@main\n',
        "Hydra 1.3 says six lines about the behaviour of 1.1, which fairseq asks for, before every training",
    ),
    (
        "fairseq/models/distributed_fairseq_model.py",
        "try:\n    from fairscale.experimental.nn.data_parallel import (\n"
        "        SlowMoBaseAlgorithm,\n        SlowMoDistributedDataParallel,\n    )\n",
        "import warnings\n\ntry:\n    with warnings.catch_warnings():\n"
        '        warnings.simplefilter("ignore", FutureWarning)\n'
        "        from fairscale.experimental.nn.data_parallel import (\n"
        "            SlowMoBaseAlgorithm,\n            SlowMoDistributedDataParallel,\n        )\n",
        "fairscale's last release uses `torch.cuda.amp`, and torch warns of it before every training",
    ),
    (
        "fairseq/tasks/text_to_speech.py",
        'logger.info("Please install tensorboardX',
        'logger.debug("Please install tensorboardX',
        "a speech task's need, said before every training; --tensorboard-logdir takes torch's own writer",
    ),
    (
        "fairseq/utils.py",
        "raise FileNotFoundError(module_path)",
        "raise SystemExit(\n"
        '                        f"fairseq: --user-dir {args.user_dir} is no folder here; give that of a plugin, "\n'
        '                        "as $(fairseq-hash user-dir) prints it"\n'
        "                    )",
        "a traceback for a folder that is not there, before any code of a plugin can run",
    ),
    (
        "pyproject.toml",
        'requires = ["setuptools", "wheel", "cython"]',
        'requires = ["setuptools<85", "wheel<1", "cython<4"]',
        "a later one may drop what this setup.py of 2022 uses; these were tried",
    ),
    (
        "fairseq/version.txt",
        RELEASE,
        VERSION,
        "pip list must tell this build from the stock release",
    ),
]


class BuildError(Exception):
    """A reason why the wheel cannot be built, in one line."""


def require_toolchain() -> None:
    """Raise `BuildError` where this Python or this machine cannot build the wheel."""
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        have = ".".join(map(str, sys.version_info[:3]))
        raise BuildError(f"this is Python {have}; use Python 3.{PYTHONS[0][1]} to 3.{PYTHONS[1][1]}")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        raise BuildError("Python.h is missing; install this Python's development headers (python3-dev)")
    find_compilers()


def find_compilers() -> "dict[str, str]":
    """Return CC and CXX as the build needs them; raise `BuildError` where there is no C++ compiler."""
    found = {}
    for name, commands in (("CXX", ("c++", "g++", "clang++")), ("CC", ("cc", "gcc", "clang"))):
        # The compiler that this Python was built with need not exist here.
        wanted = [os.environ.get(name) or sysconfig.get_config_var(name) or "", *commands]
        found[name] = next((command for command in wanted if command and shutil.which(command.split()[0])), None)
    if not found["CXX"]:
        raise BuildError("no C++ compiler on PATH; install g++ or clang++, or set CXX")
    # A C++ compiler is enough: every source that is built is C++.
    return {"CXX": found["CXX"], "CC": found["CC"] or found["CXX"]}


def run_pip(*arguments: str) -> None:
    """Run this Python's pip; its output is shown only when it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    environment = {**os.environ, **find_compilers()}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if done.returncode:
        sys.stderr.write(done.stdout)
        raise BuildError(f"`pip {arguments[0]}` failed; its output stands above (is a package index reachable?)")


def download_sdist(folder: Path) -> Path:
    """Download the source release with pip (so from whatever index pip is configured for) and return its path."""
    # In a requirements file with a hash pip itself refuses another file before it runs the file's setup.py.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"fairseq=={RELEASE} --hash=sha256:{SDIST_SHA256}\n")
    run_pip("download", "--no-deps", "--no-binary", "fairseq", "--dest", str(folder), "-r", str(requirements))
    return folder / f"fairseq-{RELEASE}.tar.gz"


def verify(sdist: Path) -> None:
    """Raise `BuildError` unless `sdist` is the released file, byte for byte."""
    if not sdist.is_file():
        raise BuildError(f"{sdist} does not exist; give the released fairseq-{RELEASE}.tar.gz or leave --sdist out")
    found = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if found != SDIST_SHA256:
        raise BuildError(f"{sdist} has sha256 {found}, the release has {SDIST_SHA256}; download it again")


def rewrite_once(path: Path, old: str, new: str) -> None:
    """Replace the one occurrence of `old` in `path` by `new`."""
    text = path.read_text(encoding="utf-8")
    if text.count(old) != 1:
        times = text.count(old)
        raise BuildError(f"{path.name} holds {old!r} {times} times, expected once; is this fairseq {RELEASE}?")
    path.write_text(text.replace(old, new), encoding="utf-8")


def open_dataclasses(source: Path) -> int:
    """Turn every bare `@dataclass` line of fairseq into `@dataclass(eq=False)` and return how many there were."""
    total = 0
    for path in sorted([*source.glob("fairseq/**/*.py"), *source.glob("fairseq_cli/**/*.py")]):
        text, count = BARE_DATACLASS.subn(r"\1@dataclass(eq=False)", path.read_text(encoding="utf-8"))
        if count:
            path.write_text(text, encoding="utf-8")
            total += count
    return total


def rewrite(source: Path) -> None:
    """Edit the unpacked release in `source` in place; raise `BuildError` where it is not what was expected."""
    for name, old, new, _ in REWRITES:
        rewrite_once(source / name, old, new)
    count = open_dataclasses(source)
    if count != BARE_DATACLASS_COUNT:
        raise BuildError(f"{count} bare @dataclass lines, expected {BARE_DATACLASS_COUNT}; is this fairseq {RELEASE}?")


def build(out: Path, sdist: "Path | None" = None) -> Path:
    """Build the wheel into the folder `out` and return its path; `sdist` replaces the download."""
    require_toolchain()
    with tempfile.TemporaryDirectory(prefix="build_fairseq_") as temporary:
        work = Path(temporary)
        if sdist is None:
            print(f"build_fairseq: downloading fairseq {RELEASE}", flush=True)
            sdist = download_sdist(work)
        verify(sdist)
        with tarfile.open(sdist) as archive:
            if hasattr(tarfile, "data_filter"):
                archive.extractall(work, filter="data")
            else:  # Python 3.10 before 3.10.12; the checksum has already been verified
                archive.extractall(work)
        source = work / f"fairseq-{RELEASE}"
        rewrite(source)
        print("build_fairseq: building the wheel (about a minute)", flush=True)
        run_pip("wheel", "--no-deps", "--wheel-dir", str(work / "wheel"), str(source))
        (wheel,) = (work / "wheel").glob("fairseq-*.whl")
        out.mkdir(parents=True, exist_ok=True)
        # Copy, then rename: never a partial wheel under its final name.
        partial = out / f".{wheel.name}.{os.getpid()}"
        shutil.copyfile(wheel, partial)
        return partial.rename(out / wheel.name)


def main() -> int:
    """Command line; exit status 1 and one line on standard error where the wheel cannot be built."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the wheel")
    parser.add_argument("--sdist", type=Path, metavar="FILE", help=f"use a local fairseq-{RELEASE}.tar.gz")
    arguments = parser.parse_args()
    try:
        print(build(arguments.out, arguments.sdist))
    except BuildError as error:
        print(f"build_fairseq: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
