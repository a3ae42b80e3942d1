"""The command `python -m data_prep`."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from fairseq_hash.cli import Parser
from fairseq_hash.errors import UserError
from fairseq_hash.provenance import usable_cores

from .binarize import SPLITS
from .corpora import CORPORA
from .dialogue import DialogueText
from .prepare import Options, prepare
from .sources import EmbeddedText, GivenText, PublicText, Source


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog="python -m data_prep", description="From text to data for fairseq-train, in one folder.")
    corpora = parser.add_subparsers(dest="corpus", required=True, metavar="CORPUS")
    text = corpora.add_parser("text", help="text files of your own: a line of text is a line of data")
    dialogue = corpora.add_parser(
        "dialogue",
        help="the same, of dialogues: lines of 'user: ...' and 'system: ...', a blank line between dialogues",
    )
    for given in (text, dialogue):
        for split, use in (("train", "to train on"), ("valid", "for validation"), ("test", "for testing")):
            given.add_argument(
                f"--{split}",
                type=Path,
                nargs="+",
                required=True,
                metavar="FILE",
                help=f"{use}: plain, .xz, .gz or .bz2",
            )
    corpora.add_parser("embedded", help="the documentation that every Python brings: no download, 400,000 words")
    for corpus in CORPORA.values():
        public = corpora.add_parser(corpus.name, help=f"{corpus.note} ({corpus.file.url})")
        public.add_argument("--local", type=Path, metavar="PATH", help="the archive, or a folder of its unpacked files")
        public.add_argument(
            "--downloads", type=Path, default=Path("data", "downloads"), metavar="DIR", help="default: data/downloads"
        )
        public.add_argument(
            "--max-bytes",
            type=int,
            metavar="N",
            help="take whole documents from the beginning up to N bytes (cc100-en)",
        )
    for parsed in corpora.choices.values():
        parsed.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the data, not there yet")
        parsed.add_argument(
            "--words", action="store_true", help="tokens are words between spaces, as WikiText is reported; not pieces"
        )
        parsed.add_argument(
            "--vocab-size",
            type=int,
            metavar="N",
            help="pieces of the SentencePiece model, 256 of them bytes (default: 8000); with --words the most symbols "
            "(default: no limit)",
        )
        parsed.add_argument("--min-count", type=int, default=1, metavar="N", help="with --words: rarer words are <unk>")
        parsed.add_argument(
            "--like", type=Path, metavar="DIR", help="use the model and dictionary of data prepared before"
        )
        parsed.add_argument("--seed", type=int, default=1, metavar="N", help="of the text the model is trained on")
        parsed.add_argument(
            "--workers", type=int, default=usable_cores(), metavar="N", help="processes (default: cores)"
        )
    return parser


def source_of(arguments: argparse.Namespace) -> Source:
    """Return the corpus that the command line names."""
    if arguments.corpus in ("text", "dialogue"):
        given = GivenText if arguments.corpus == "text" else DialogueText
        return given({split: getattr(arguments, split) for split in SPLITS})
    if arguments.corpus == "embedded":
        return EmbeddedText()
    corpus = CORPORA[arguments.corpus]
    return PublicText(corpus, arguments.downloads, arguments.local, arguments.max_bytes, arguments.words)


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run the command. Returns 0, 1 after one line on standard error where the input is bad, 130 where interrupted."""
    arguments = build_parser().parse_args(argv)
    # A plain SIGTERM would leave the processes that this one started running.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        options = Options(
            arguments.words,
            arguments.vocab_size,
            arguments.min_count,
            arguments.like,
            arguments.seed,
            arguments.workers,
        )
        made = prepare(source_of(arguments), arguments.out, options)
    except UserError as error:
        print(f"data_prep: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"data_prep: {error}; make room or set permissions, then run again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("data_prep: interrupted; the same command goes on from the last step done", file=sys.stderr)
        return 130
    print(f"{arguments.out}: {'ready' if made else 'done before'}; train with fairseq-train {arguments.out}")
    return 0
