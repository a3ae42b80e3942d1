"""The demo's corpus: found, or prepared once and kept; and fingerprints that tell data and code apart."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from demo_process import run_logged

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.progress import Display
from fairseq_hash.hashing.dictionary import read_dictionary
from fairseq_hash.provenance import sha256_of_file
from fairseq_hash.table_tools.token_streams import open_text

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 400
SPLITS = ("train", "valid", "test")
HELD_OUT = 65_536  # tokens of valid and of test, at most: scoring more would take longer than some of the trainings
# For the bars only: as many updates of training as take about as long.
PREPARATION_WORK = 30
# Folders of fairseq_hash whose code looks at runs and models, and makes none.
LOOKING = ("api", "cli", "export", "reporting")


def prepare_data(given: "Path | None", out: Path, display: Display) -> Path:
    """Return the folder of binarized data, made here unless it was given or is there already."""
    if given and (given / "dict.txt").is_file():
        missing = [name for name in data_files() if not (given / name).is_file()]
        if missing:
            raise UserError(f"--data {given} lacks {missing[0]}; prepare train, valid and test together")
        display.skip("data", PREPARATION_WORK)
        return given
    ways = ["text", *_text_files(given)] if given else ["embedded"]
    made_of = {"command": ways, "code": code_fingerprint(ROOT / "data_prep"), "python": sys.version.split()[0]}
    made_of["text"] = [sha256_of_file(Path(path)) for path in ways[2::2]]
    folder = out / "data" / f"corpus-{short_hash(made_of)}"
    if (folder / "dict.txt").is_file():
        display.skip("data", PREPARATION_WORK)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    display.begin("data", PREPARATION_WORK)
    command = [sys.executable, "-m", "data_prep", *ways, "--vocab-size", str(VOCABULARY), "--out", str(folder)]
    run_logged(command, folder.parent / f"{folder.name}.log", ROOT, lambda line: display.detail(line.strip()[:60]))
    display.end(f"prepared in {shown(folder)}")
    return folder


def cut_data(data: Path, tokens: int, out: Path, display: Display) -> Path:
    """Return data with exactly so many training tokens, each of them seen once, and `HELD_OUT` tokens to score.

    A split with fewer tokens stays whole: short training text is seen more than once.
    """
    symbols, _ = read_dictionary(data / "dict.txt")
    most = {"train": tokens, "valid": HELD_OUT, "test": HELD_OUT}
    sizes = {split: sum(map(len, open_text(data, split, symbols).blocks())) for split in SPLITS}
    cuts = {split: limit for split, limit in most.items() if sizes[split] > limit}
    if not cuts:
        return data
    made_of = {"data": data_fingerprint(data), "tokens": cuts, "code": code_fingerprint(ROOT / "data_prep")}
    folder = out / "data" / f"part-{short_hash(made_of)}"
    if not (folder / "dict.txt").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        words = [word for split, limit in cuts.items() for word in (f"--{split}-tokens", str(limit))]
        command = [sys.executable, "-m", "data_prep", "cut", str(data), *words, "--out", str(folder)]
        run_logged(command, folder.parent / f"{folder.name}.log", ROOT, lambda line: None)
        of_it = ", ".join(f"{limit:,} tokens of {split}" for split, limit in cuts.items())
        display.say(f"data: {of_it}, in {shown(folder)}")
    return folder


def _text_files(folder: Path) -> list[str]:
    """Return the options of data_prep for a folder of train.txt, valid.txt and test.txt."""
    paths = {split: folder / f"{split}.txt" for split in SPLITS}
    if missing := [path.name for path in paths.values() if not path.is_file()]:
        raise UserError(
            f"--data {folder} has no {missing[0]}; give a folder with train.txt, valid.txt and test.txt, or one that "
            "fairseq-preprocess made"
        )
    return [word for split, path in paths.items() for word in (f"--{split}", str(path))]


def data_files() -> list[str]:
    """Return the names of the files that a training and its evaluations read."""
    return ["dict.txt", *(f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx"))]


def data_fingerprint(folder: Path) -> str:
    """Return a hash of the dictionary and the binarized splits."""
    return hashlib.sha256("".join(sha256_of_file(folder / name) for name in data_files()).encode()).hexdigest()


def code_fingerprint(folder: Path) -> str:
    """Return a hash of the Python files in a folder and below it, without those that change no training."""
    names = {path.relative_to(folder): path for path in folder.rglob("*.py")}
    names = {name: path for name, path in names.items() if name.parts[0] not in LOOKING}
    digests = [f"{name.as_posix()} {sha256_of_file(path)}" for name, path in sorted(names.items())]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def short_hash(content: Any) -> str:
    """Return eight digits that tell JSON-ready contents apart."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def shown(path: Path) -> str:
    """Return a path as the commands get it: from the repository's root where it lies inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
