"""The commands `python -m data_prep` and `fairseq-hash data`."""

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import fairseq_hash
from fairseq_hash.cli import Parser
from fairseq_hash.core.errors import UserError
from fairseq_hash.core.options import add_options, given_options

from .corpora import CORPORA, SPLITS
from .dialogue import DialogueText
from .options import Options
from .sources import EmbeddedText, GivenText, PublicText, Source

DESCRIPTION = "Prepare text as data for fairseq-train, in one folder (docs/data.md)."
INTERRUPTED = "interrupted; the same command continues from the last finished step"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the corpora and their options to a parser."""
    corpora = parser.add_subparsers(dest="corpus", required=True, metavar="CORPUS")
    text = corpora.add_parser("text", help="text files of your own: a line of text is a line of data")
    dialogue = corpora.add_parser(
        "dialogue", help="dialogues of your own: lines 'user: ...' and 'system: ...', a blank line between dialogues"
    )
    for given in (text, dialogue):
        for split, use in (("train", "to train on"), ("valid", "for validation"), ("test", "for testing")):
            words = f"{use}: plain, .xz, .gz or .bz2"
            given.add_argument(f"--{split}", type=Path, nargs="+", required=True, metavar="FILE", help=words)
    words = "what the text is, by the name that published figures give it; without it none compare (default: text)"
    text.add_argument("--corpus", dest="corpus_name", default="text", metavar="NAME", help=words)
    corpora.add_parser("embedded", help="the documentation that every Python brings: no download, 400,000 words")
    for corpus in CORPORA.values():
        public = corpora.add_parser(corpus.name, help=f"{corpus.note} ({corpus.file.url})")
        add, downloads = public.add_argument, Path("data", "downloads")
        add("--local", type=Path, metavar="PATH", help="the archive, or a folder of its unpacked files")
        add("--downloads", type=Path, default=downloads, metavar="DIR", help=f"default: {downloads}")
        add(
            "--max-bytes",
            type=int,
            metavar="N",
            help="take whole documents from the beginning up to N bytes (cc100-en)",
        )
    for parsed in corpora.choices.values():
        out = "folder for the data, which must not exist yet"
        parsed.add_argument("--out", type=Path, required=True, metavar="DIR", help=out)
        add_options(parsed, Options)
    _add_cut(corpora.add_parser("cut", help="a smaller copy of prepared data: passages that lie evenly over the text"))


def _add_cut(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="folder that data_prep or fairseq-preprocess wrote")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the copy, which must not exist yet")
    for split in SPLITS:
        add(f"--{split}-tokens", type=int, metavar="N", help=f"tokens of {split}, </s> counted (default: all)")


def source_of(arguments: argparse.Namespace) -> Source:
    """Return the corpus that the command line names."""
    if arguments.corpus in ("text", "dialogue"):
        files = {split: getattr(arguments, split) for split in SPLITS}
        return GivenText(files, arguments.corpus_name) if arguments.corpus == "text" else DialogueText(files)
    if arguments.corpus == "embedded":
        return EmbeddedText()
    corpus = CORPORA[arguments.corpus]
    return PublicText(corpus, arguments.downloads, arguments.local, arguments.max_bytes, arguments.words)


def run(arguments: argparse.Namespace) -> None:
    """Prepare the corpus that the arguments name.

    Raises:
        UserError: with one line, if the input is bad or a file cannot be written.
        KeyboardInterrupt: if it was interrupted, once its processes have ended.
    """
    options = None if arguments.corpus == "cut" else given_options(Options, arguments)
    with _ended_by_one_signal():
        fairseq_hash.register()  # before fairseq is imported, to suppress its messages
        from .cut import cut
        from .prepare import prepare

        try:
            if options is None:
                wanted = {split: getattr(arguments, f"{split}_tokens") for split in SPLITS}
                made = cut(arguments.data, arguments.out, wanted)
            else:
                made = prepare(source_of(arguments), arguments.out, options)
        except OSError as error:
            raise UserError(f"{error}; make room or set permissions, then run again") from error
    print(f"{arguments.out}: {'ready' if made else 'done before'}; train with fairseq-train {arguments.out}")


@contextmanager
def _ended_by_one_signal() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the processes that this one started, and let a second Ctrl-C not interrupt that."""

    def interrupt(_number: int, _frame: "FrameType | None") -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    def terminate(number: int, _frame: "FrameType | None") -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGINT, interrupt), signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run `python -m data_prep`. Returns 0, 1 after one line on standard error for bad input, 130 if interrupted."""
    try:
        parser = Parser(prog="python -m data_prep", description=DESCRIPTION)
        add_arguments(parser)
        run(parser.parse_args(argv))
    except UserError as error:
        print(f"data_prep: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"data_prep: {INTERRUPTED}", file=sys.stderr)
        return 130
    return 0
