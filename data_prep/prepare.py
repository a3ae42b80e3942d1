"""The preparation, step by step: text, model, tokens, dictionary, binarized data, and where it all comes from.

Everything is made in `OUT.partial` and renamed to `OUT` at the end. What is done is written down after every step, so
that the same call goes on where an earlier one was stopped.
"""

import json
import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fairseq.data import Dictionary

from data_prep import pieces
from data_prep.binarize import SPLITS, join, make_dictionary, preprocess
from data_prep.chunks import ChunkWriter
from data_prep.download import exclusive
from data_prep.sources import TEXT_WORK, Source
from data_prep.text import read_lines
from fairseq_hash.errors import UserError
from fairseq_hash.hashing import dictionary_fingerprint
from fairseq_hash.progress import Display
from fairseq_hash.provenance import provenance, sha256_of_file

MODEL, DICTIONARY, PROVENANCE = "sentencepiece.model", "dict.txt", "provenance.json"
SAMPLE_BYTES = 100 << 20  # of text the SentencePiece model is trained on; its training holds them in memory
BYTES_A_WORKER = 16 << 20  # starting a process pays from there on
MODEL_WORK, PIECES_WORK, BINARIZE_WORK = 10.0, 40.0, 40.0


@dataclass(frozen=True)
class Options:
    """How text becomes data. Raises `UserError` where a value is out of range.

    Attributes:
        words: tokens are words, not SentencePiece pieces.
        vocabulary: pieces of the model, or the largest number of symbols in the dictionary of words (None: no limit).
        least_count: occurrences that a word needs to be in the dictionary.
        like: a folder of prepared data whose model and dictionary are used.
        seed: of the sample that the model is trained on, where the text is larger than the sample.
        workers: processes.
    """

    words: bool = False
    vocabulary: "int | None" = None
    least_count: int = 1
    like: "Path | None" = None
    seed: int = 1
    workers: int = 1

    def __post_init__(self) -> None:
        if self.vocabulary is not None and not 8 <= self.vocabulary <= 10_000_000:
            raise UserError(f"--vocab-size {self.vocabulary} is out of range; give a number from 8 to 10,000,000")
        for name, value in (("min-count", self.least_count), ("workers", self.workers)):
            if not 1 <= value <= 1_000_000:
                raise UserError(f"--{name} {value} is out of range; give a number of 1 or more")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed} is out of range; give a number of 0 or more")
        if self.least_count > 1 and not self.words:
            raise UserError(
                f"--min-count {self.least_count} is for --words; a SentencePiece model has a fixed vocabulary"
            )
        if self.like and (self.vocabulary is not None or self.least_count > 1):
            raise UserError(
                "--like takes model and dictionary from that folder; leave out --vocab-size and --min-count"
            )
        if self.like:
            needed = [DICTIONARY, PROVENANCE] + ([] if self.words else [MODEL])
            if missing := [name for name in needed if not (self.like / name).is_file()]:
                raise UserError(f"--like {self.like} has no {missing[0]}; give a folder that python -m data_prep made")

    def identity(self) -> dict[str, Any]:
        """Return what makes the data what it is, JSON-ready."""
        kept = {key: value for key, value in asdict(self).items() if key not in ("workers", "like")}
        return kept | {"like": self.like and sha256_of_file(self.like / DICTIONARY)}


def prepare(source: Source, out: Path, options: Options, display_for: Callable[[float], Display] = Display) -> bool:
    """Prepare a corpus in the folder `out`; return False where it was done before, by the same options.

    Raises:
        UserError: where the text cannot be used, `out` holds something else, or a step fails.
    """
    identity = {**source.identity(), **options.identity()}
    if out.is_dir() and any(out.iterdir()):
        if _read_json(out / PROVENANCE).get("identity") == identity:
            return False
        raise UserError(f"--out {out} holds something else; give another folder, or delete it")
    work = out.with_name(f"{out.name}.partial")
    work.mkdir(parents=True, exist_ok=True)
    lock = work.with_name(f"{work.name}.lock")
    with exclusive(lock):
        steps = Preparation(source, work, options, identity)
        with display_for(TEXT_WORK + MODEL_WORK + PIECES_WORK + BINARIZE_WORK) as display:
            steps.run(display)
        os.replace(work, out)
        lock.unlink()
    return True


class Preparation:
    """The steps of one preparation, in its folder `work`. `state` holds what they found, and is saved after each."""

    def __init__(self, source: Source, work: Path, options: Options, identity: dict[str, Any]) -> None:
        self.source, self.work, self.options, self.identity = source, work, options, identity
        self.state = _read_json(work / "state.json")
        if self.state.get("identity") != identity:
            # Of another preparation, or stopped before its first step was done.
            for path in work.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.state = {"identity": identity, "parts": []}

    def run(self, display: Display) -> None:
        """Do what is not done yet."""
        self.files = self.source.fetch(self.work / "text", display)
        self.bytes = {split: sum(path.stat().st_size for path in paths) for split, paths in self.files.items()}
        self._step("model", MODEL_WORK, display, self._make_model)
        self._step("tokens", PIECES_WORK, display, self._make_tokens)
        self._step("data", BINARIZE_WORK, display, self._binarize)
        self._finish()

    def _step(self, name: str, work: float, display: Display, make: Callable[[Display], str]) -> None:
        if name in self.state:
            display.skip(name, work)
            return
        display.begin(name, work)
        result = make(display)
        self.state[name] = result
        self._save_state()
        display.end(result)

    def _save_state(self) -> None:
        _write_json(self.work / "state.json", self.state)

    def _make_model(self, display: Display) -> str:
        if self.options.words:
            return "words need none"
        if self.options.like:
            shutil.copyfile(self.options.like / MODEL, self.work / MODEL)
            return f"of {self.options.like}"
        sample = self.work / "sample.txt"
        taken = self._write_sample(sample, display)
        size = self.options.vocabulary or 8000
        display.advance(0.5, f"training {size:,} pieces on {taken / 1e6:,.1f} MB")
        try:
            # In a process of its own: its memory is given back.
            with pieces.workers(1, None) as pool:
                pool.submit(pieces.train_model, sample, self.work / MODEL, size).result()
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split()).rpartition("] ")[2] or type(error).__name__
            raise UserError(f"--vocab-size {size} does not fit this text: {reason}") from error
        sample.unlink()
        return f"{size:,} pieces, trained on {taken / 1e6:,.1f} MB"

    def _write_sample(self, path: Path, display: Display) -> int:
        """Write lines for the training of the model, all of them where they are few; return their bytes."""
        total = self.bytes["train"]
        # Of a compressed file the size is not known before it is read; 8 is more than text compresses to as a rule.
        size = sum(f.stat().st_size * (1 if f.suffix not in (".xz", ".gz", ".bz2") else 8) for f in self.files["train"])
        share = min(1.0, SAMPLE_BYTES / size)
        generator = random.Random(self.options.seed)
        taken = 0
        with path.open("w", encoding="utf-8", newline="\n") as file:
            lines = read_lines(self.files["train"], lambda done: display.advance(0.5 * done / total, "reading"))
            for line in lines:
                if line.strip() and (share == 1.0 or generator.random() < share) and taken < SAMPLE_BYTES:
                    file.write(line + "\n")
                    taken += len(line.encode()) + 1
        return taken

    def _make_tokens(self, display: Display) -> str:
        """Write every split as chunks of tokens, and the dictionary of the training text."""
        folder = self.work / "tokens"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        model = None if self.options.words else self.work / MODEL
        count = min(self.options.workers, 1 + sum(self.bytes.values()) // BYTES_A_WORKER)
        counts, splits = {}, {}
        with pieces.workers(count, model) as pool:
            done_before = 0
            for split in SPLITS:

                def show(done: int, split: str = split, before: int = done_before) -> None:
                    total = sum(self.bytes.values())
                    display.advance((before + done) / total, f"{split}: {done / 1e6:,.1f} MB")

                batches = pieces.encode_in_order(read_lines(self.files[split], show), pool, count)
                with ChunkWriter(folder, split) as writer:
                    for batch in batches:
                        writer.add(batch)
                counts[split], splits[split] = writer.counts, writer.totals()
                self._check_expected(split, writer.lines + writer.tokens)
                done_before += self.bytes[split]
        dictionary = self._make_dictionary(counts["train"], model)
        dictionary.save(str(self.work / DICTIONARY))
        for split in SPLITS:
            unknown = sum(count for token, count in counts[split].items() if token not in dictionary.indices)
            splits[split]["unknown"] = unknown + counts[split].get(dictionary.unk_word, 0)
        self.state["splits"], self.state["symbols"] = splits, len(dictionary)
        self.state["dictionary_fingerprint"] = dictionary_fingerprint(dictionary.symbols)
        return f"{splits['train']['tokens'] + splits['train']['lines']:,} to train on, {len(dictionary):,} symbols"

    def _check_expected(self, split: str, found: int) -> None:
        expected = self.source.expected_tokens and self.source.expected_tokens[split]
        if expected and expected != found:
            raise UserError(
                f"{split} has {found:,} tokens with the ends of lines, the published corpus {expected:,}; "
                "give the corpus as it was published"
            )

    def _make_dictionary(self, counts: Counter[str], model: "Path | None") -> Dictionary:
        if self.options.like:
            return Dictionary.load(str(self.options.like / DICTIONARY))
        of_model = pieces.model_pieces(model) if model else None
        most = self.options.vocabulary if model is None else None
        return make_dictionary(counts, of_model, most, self.options.least_count)

    def _binarize(self, display: Display) -> str:
        splits: dict[str, dict[str, Any]] = self.state["splits"]
        parts = max(len(totals["chunks"]) for totals in splits.values())
        missing = [part for part in range(parts) if part not in self.state["parts"]]
        display.advance(1 - len(missing) / parts, f"part {parts - len(missing) + 1} of {parts}")
        # One process a part: with workers of its own fairseq-preprocess would wait for them before it does its share.
        with ThreadPoolExecutor(min(self.options.workers, parts)) as pool:
            running: list[subprocess.Popen[bytes]] = []
            calls = {pool.submit(self._binarize_part, part, splits, running): part for part in missing}
            try:
                for call in as_completed(calls):
                    call.result()
                    self.state["parts"].append(calls[call])
                    self._save_state()
                    done = len(self.state["parts"])
                    display.advance(done / parts, f"part {done} of {parts}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in running:
                    child.kill()
                raise
        for split, totals in splits.items():
            if not (self.work / f"{split}.idx").exists():
                join([self._part(part) / split for part in range(len(totals["chunks"]))], self.work / split)
        shutil.rmtree(self.work / "parts", ignore_errors=True)
        return f"{parts} {'part' if parts == 1 else 'parts'}"

    def _part(self, part: int) -> Path:
        return self.work / "parts" / f"{part:03d}"

    def _binarize_part(
        self, part: int, splits: dict[str, dict[str, Any]], running: "list[subprocess.Popen[bytes]]"
    ) -> None:
        chunks = {
            split: self.work / "tokens" / totals["chunks"][part]
            for split, totals in splits.items()
            if part < len(totals["chunks"])
        }
        preprocess(chunks, self.work / DICTIONARY, self._part(part), running)

    def _finish(self) -> None:
        made = sorted(path for path in self.work.iterdir() if path.is_file() and path.name != "state.json")
        record = {
            "identity": self.identity,
            **provenance(),
            "sources": {
                split: [{"name": f.name, "bytes": f.stat().st_size, "sha256": sha256_of_file(f)} for f in paths]
                for split, paths in self.files.items()
            },
            **{key: self.state[key] for key in ("splits", "symbols", "dictionary_fingerprint", "model")},
            "sha256": {path.name: sha256_of_file(path) for path in made if path.suffix != ".log"},
        }
        _write_json(self.work / PROVENANCE, record)
        (self.work / "state.json").unlink()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, path)
