"""The preparation, step by step: text, model, tokens, dictionary, binarized data, provenance.

Everything is made in `OUT.partial`, which is renamed to `OUT` at the end. The state is saved after every step, so that
the same call continues a stopped one.
"""

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from fairseq.data import Dictionary

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import remove_partials, write_json
from fairseq_hash.core.progress import Display
from fairseq_hash.hashing import dictionary_fingerprint
from fairseq_hash.provenance import provenance, sha256_of_file

from . import pieces
from .binarize import binarize, make_dictionary
from .corpora import SPLITS
from .download import exclusive
from .options import DICTIONARY, MODEL, PROVENANCE, Options, read_json
from .sources import TEXT_WORK, Source
from .text import read_lines
from .verify import check_counts

Result = TypeVar("Result")

STATE = "state.json"
SAMPLE_BYTES = 100 << 20  # bytes of text on which the SentencePiece model is trained; its training holds them in memory
BYTES_A_WORKER = 16 << 20  # from this size on, starting a process pays
MODEL_WORK, PIECES_WORK, BINARIZE_WORK = 10.0, 40.0, 40.0


def prepare(source: Source, out: Path, options: Options) -> bool:
    """Prepare a corpus in the folder `out`. Return False if it was prepared before with the same options.

    Raises:
        UserError: if the text cannot be used, `out` holds something else, or a step fails.
    """
    place = place_of(out)
    identity = {**source.identity(), **options.identity()}
    if is_done(out, identity):
        return False
    work = place.with_name(f"{place.name}.partial")
    work.mkdir(parents=True, exist_ok=True)
    lock = work.with_name(f"{work.name}.lock")
    with exclusive(lock):
        remove_partials(work)
        steps = Preparation(source, work, options, identity)
        with Display(TEXT_WORK + MODEL_WORK + PIECES_WORK + BINARIZE_WORK) as display:
            try:
                steps.run(display)
            except BrokenProcessPool as error:
                raise UserError(
                    "a worker process was killed (is memory short?); give fewer --workers, then run again"
                ) from error
        os.replace(work, place)
        (place / STATE).unlink()
        lock.unlink()
    return True


def is_done(out: Path, identity: dict[str, Any]) -> bool:
    """Return whether `out` holds data of this identity already. Raises `UserError` if it holds something else."""
    if not (out.is_dir() and any(out.iterdir())):
        return False
    if read_json(out / PROVENANCE).get("identity") != identity:
        raise UserError(f"--out {out} holds something else; give another folder, or delete it")
    return True


def place_of(out: Path) -> Path:
    """Return the folder that `out` names, with links followed. Raises `UserError` if no folder can get that name."""
    if out.is_symlink() and not out.exists():
        raise UserError(f"--out {out} is a link to a folder that does not exist; make that folder, or give another")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder that does not exist yet")
    place = out.resolve()
    if place == Path.cwd() or os.path.ismount(place):
        what = "where you are" if place == Path.cwd() else "the root of a file system"
        raise UserError(f"--out {out} is {what}, and cannot be replaced; give a folder in it: --out {out / 'data'}")
    return place


class Preparation:
    """The steps of one preparation, in its folder `work`. `state` holds their results, and is saved after each step."""

    def __init__(self, source: Source, work: Path, options: Options, identity: dict[str, Any]) -> None:
        self.source, self.work, self.options, self.identity = source, work, options, identity
        self.state = read_json(work / STATE)
        if self.state.get("identity") != identity:
            # The state of another preparation, or of one that was stopped during its first step.
            for path in work.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.state = {"identity": identity}
        self.model = None if options.words else work / MODEL

    def run(self, display: Display) -> None:
        """Do the steps that are not done yet."""
        self.files = self.source.fetch(self.work / "text", display)
        self.bytes = {split: sum(path.stat().st_size for path in paths) for split, paths in self.files.items()}
        self._step("model", MODEL_WORK, display, self._make_model)
        self._step("tokens", PIECES_WORK, display, self._count_tokens)
        self._step("data", BINARIZE_WORK, display, self._binarize)
        self._finish()

    def _step(self, name: str, work: float, display: Display, make: Callable[[Display], str]) -> None:
        if name in self.state:
            display.skip(name, work)
            return
        display.begin(name, work)
        result = make(display)
        self.state[name] = result
        write_json(self.work / STATE, self.state)
        display.end(result)

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
            # In a process of its own, so that its memory is given back.
            with pieces.workers(1, None) as pool:
                pieces.submit(pool, pieces.train_model, sample, self.work / MODEL, size).result()
        except BrokenProcessPool:
            raise
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split()).rpartition("] ")[2] or type(error).__name__
            raise UserError(f"--vocab-size {size} does not fit this text: {reason}") from error
        sample.unlink()
        return f"{size:,} pieces, trained on {taken / 1e6:,.1f} MB"

    def _write_sample(self, path: Path, display: Display) -> int:
        """Write lines for the training of the model (all lines if they are few); return their bytes."""
        total = self.bytes["train"]
        # The size of a compressed text is not known before it is read; a factor of 8 is more than usual for text.
        size = sum(f.stat().st_size * (1 if f.suffix not in (".xz", ".gz", ".bz2") else 8) for f in self.files["train"])
        share = min(1.0, SAMPLE_BYTES / size)
        generator = random.Random(self.options.seed)
        taken = 0
        with path.open("w", encoding="utf-8", newline="\n") as file:
            lines = read_lines(self.files["train"], lambda done: display.advance(0.5 * done / total, "reading"))
            for line in lines:
                if line.strip() and (share == 1.0 or generator.random() < share) and taken < SAMPLE_BYTES:
                    written = pieces.plain(line) + "\n"
                    file.write(written)
                    taken += len(written.encode())
        return taken

    def _workers(self, indices: "dict[str, int] | None" = None) -> AbstractContextManager[ProcessPoolExecutor]:
        number = min(self.options.workers, 1 + sum(self.bytes.values()) // BYTES_A_WORKER)
        return pieces.workers(number, self.model, indices)

    def _by_split(
        self, function: Callable[[list[str]], Result], pool: ProcessPoolExecutor, display: Display
    ) -> "Iterator[tuple[str, Iterator[Result]]]":
        """Yield every split, and what `function` makes of each batch of its lines."""
        total, before = sum(self.bytes.values()), 0
        for split in SPLITS:

            def show(done: int, split: str = split, before: int = before) -> None:
                display.advance((before + done) / total, f"{split}: {done / 1e6:,.1f} MB")

            yield split, pieces.in_order(function, read_lines(self.files[split], show), pool)
            before += self.bytes[split]

    def _count_tokens(self, display: Display) -> str:
        """Count the tokens of every split, and write the dictionary of the training text."""
        splits: dict[str, dict[str, int]] = {}
        counts: dict[str, Counter[str]] = {}
        with self._workers() as pool:
            for split, batches in self._by_split(pieces.count, pool, display):
                totals, counts[split] = Counter[str](), Counter()
                for of_batch, tokens in batches:
                    totals.update(of_batch)
                    counts[split].update(tokens)
                if totals["reserved"]:
                    display.say(
                        f"{split}: {totals['reserved']:,} words are <unk>: fairseq's dictionary keeps "
                        f"{', '.join(pieces.RESERVED)} for itself"
                    )
                self._check_expected(split, totals["lines"] + totals["tokens"])
                splits[split] = dict(totals)
        dictionary = self._make_dictionary(counts["train"])
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

    def _make_dictionary(self, counts: Counter[str]) -> Dictionary:
        if self.options.like:
            return Dictionary.load(str(self.options.like / DICTIONARY))
        of_model = pieces.model_pieces(self.model) if self.model else None
        most = None if self.model else self.options.vocabulary
        return make_dictionary(counts, of_model, most, self.options.least_count)

    def _binarize(self, display: Display) -> str:
        """Cut the text into tokens again, now that each token has an id: this saves a copy of the text in tokens."""
        indices = Dictionary.load(str(self.work / DICTIONARY)).indices
        with self._workers(indices) as pool:
            for split, batches in self._by_split(pieces.ids_of, pool, display):
                binarize(batches, len(indices), self.work / split)
                counted = split == "train" and not self.options.like
                check_counts(self.work / split, self.work / DICTIONARY, self.state["splits"][split], counted)
        return f"{sum((self.work / f'{split}.bin').stat().st_size for split in SPLITS) / 1e6:,.1f} MB"

    def _finish(self) -> None:
        made = sorted(path for path in self.work.iterdir() if path.is_file() and path.name not in (STATE, PROVENANCE))
        record = {
            "identity": self.identity,
            **provenance(),
            "sources": {
                split: [{"name": f.name, "bytes": f.stat().st_size, "sha256": sha256_of_file(f)} for f in paths]
                for split, paths in self.files.items()
            },
            **{key: self.state[key] for key in ("splits", "symbols", "dictionary_fingerprint", "model")},
            "sha256": {path.name: sha256_of_file(path) for path in made},
        }
        write_json(self.work / PROVENANCE, record)
