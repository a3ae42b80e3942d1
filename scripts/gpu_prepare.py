#!/usr/bin/env python3
"""Fill `.gpu` with what a GPU machine without a network lacks: wheels, binarized text, the data of study `one_gpu`.

    bash scripts/gpu_round.sh --prepare [--text DIR] [--python PYTHON] [--vocab-size N]

The folder is ignored by git and travels beside the tree. What is there stays: delete a part to have it made anew.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fairseq_hash.cli import Parser

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".gpu"
MOST_BYTES = 56_000_000
# What the project needs beside torch and the packages of any machine for machine learning (docs/gpu.md names them).
WHEELS = ("hydra-core==1.3.8", "omegaconf==2.3.1", "antlr4-python3-runtime==4.9.3", "fairscale==0.4.13")
WHEELS += ("bitarray==3.12.3", "cffi==2.1.1", "pycparser==3.12")
SUBSETS = ("train", "valid", "test")
TOKENS = 2**20  # of the text that is trained on to measure speed
STUDY = "one_gpu"


def run(words: Sequence["str | Path"]) -> None:
    """Run a command; end with its last line where it fails."""
    done = subprocess.run(list(map(str, words)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        last = done.stdout.strip().splitlines()[-1:]
        sys.exit(f"gpu_prepare: {' '.join(map(str, words[:4]))} ... failed: {' '.join(last)}")


def collect_wheels(python: str) -> None:
    """Build fairseq for the GPU machine's Python, and get the wheels of its small needs."""
    folder = FOLDER / "wheels"
    program = "import sys; print('cp%d%d' % sys.version_info[:2])"
    asked = subprocess.run([python, "-c", program], capture_output=True, text=True)
    if asked.returncode:  # before the wheels that are there are deleted
        sys.exit(f"gpu_prepare: --python {python} does not run: {' '.join(asked.stderr.split())}")
    tag = asked.stdout.strip()
    if list(folder.glob(f"fairseq-*-{tag}-*.whl")) and len(list(folder.glob("*.whl"))) == 1 + len(WHEELS):
        return
    print("gpu_prepare: wheels (a minute or two)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)  # of another Python, or not all of them
    run([python, ROOT / "scripts" / "build_fairseq.py", "--out", folder])
    run([python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, *WHEELS])


def binarize(text: "Path | None", pieces: int) -> None:
    """Make the data on which speed is measured: of the given text, or of the one that Python brings."""
    folder, made, whole = FOLDER / "data", FOLDER / "making", FOLDER / "whole"
    if folder.is_dir():
        if text is not None:
            print("gpu_prepare: .gpu/data is there and stays; delete it to have it made of another text")
        return
    print("gpu_prepare: data (a minute or two)", flush=True)
    source = ["embedded"]
    if text is not None:
        source = ["text", *(word for subset in SUBSETS for word in (f"--{subset}", text / f"{subset}.txt"))]
    for path in (made, whole):
        shutil.rmtree(path, ignore_errors=True)
    run([sys.executable, "-m", "data_prep", *source, "--vocab-size", pieces, "--out", whole])
    run([sys.executable, "-m", "data_prep", "cut", whole, "--train-tokens", TOKENS, "--out", made])
    shutil.rmtree(whole)
    made.rename(folder)


def prepare_study(text: Path) -> None:
    """Make the data of the study."""
    folder, made = FOLDER / "study", FOLDER / "making"
    if folder.is_dir():
        return
    print(f"gpu_prepare: data and n-gram lines of study {STUDY} (a minute or two)", flush=True)
    shutil.rmtree(made, ignore_errors=True)
    main = "import sys; from fairseq_hash.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ("study", STUDY, "--plan", "--text", text, "--work", made, "--records", records_of_study())
    run([sys.executable, "-c", main, *words])
    # Beside the study's part of the text lies the whole, whose name it begins with.
    max((made / "data").iterdir(), key=lambda path: len(path.name)).rename(folder)
    shutil.rmtree(made)


def records_of_study() -> Path:
    """Return the folder of the records that the project has."""
    return ROOT / "benchmarks" / "results" / "studies" / STUDY


def size_of(folder: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    return sum(path.stat().st_size for path in [folder, *folder.rglob("*")] if path.is_file())


def parse() -> argparse.Namespace:
    """Return the arguments, checked."""
    parser = Parser(prog="gpu_round.sh --prepare", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--text", type=Path, metavar="DIR", help="with train.txt, valid.txt, test.txt; without it there is no study")
    add("--vocab-size", type=int, default=8000, metavar="N", help="pieces (default: 8000)")
    add("--python", default="python3.12", help="the GPU machine's version, here (default: python3.12)")
    arguments = parser.parse_args()
    if arguments.text is not None:
        for name in (f"{subset}.txt" for subset in SUBSETS):
            if not (arguments.text / name).is_file():
                parser.error(f"--text {arguments.text}: there is no {name}; give a folder that has it")
    if shutil.which(arguments.python) is None:
        parser.error(f"--python {arguments.python} is not on PATH; give the Python whose version the GPU machine has")
    return arguments


def main() -> None:
    """Fill the folder and say how to go on."""
    arguments = parse()
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / ".gitignore").write_text("*\n")
    collect_wheels(arguments.python)
    binarize(arguments.text, arguments.vocab_size)
    if arguments.text is not None:
        prepare_study(arguments.text)
    size = size_of(FOLDER)
    if size > MOST_BYTES:
        largest = max(FOLDER.iterdir(), key=size_of)
        sys.exit(
            f"gpu_prepare: .gpu has {size / 1e6:.0f} MB, more than {MOST_BYTES / 1e6:.0f} (most in {largest.name}); "
            "give less text"
        )
    print(f"gpu_prepare: .gpu is ready, {size / 1e6:.0f} MB. On the GPU machine, with the tree and .gpu:")
    print("    bash scripts/gpu_round.sh results")


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
