"""`fairseq-hash export`: a model for other libraries."""

import argparse
import re
from pathlib import Path

from fairseq_hash.cli.sample import check_checkpoint
from fairseq_hash.core.errors import UserError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb `export`, and add its arguments."""
    parser.description = (
        "Write a folder that transformers loads (trust_remote_code=True): weights as safetensors, one file "
        "of plain PyTorch, the tokenizer and a model card. It needs neither fairseq nor fairseq_hash."
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CKPT", help="main file, such as checkpoint_best.pt")
    add("--to", choices=("hf",), required=True, help="format: hf (transformers)")
    add("out", type=Path, metavar="DIR", help="folder to write, which must not exist")
    folder = "folder with dict.txt and, for pieces, sentencepiece.model (default: that of the training)"
    add("--data", type=Path, metavar="DIR", help=folder)
    model = "SentencePiece model (default: sentencepiece.model beside dict.txt)"
    add("--sentencepiece", type=Path, metavar="FILE", help=model)
    size = "largest size of one file of weights: bytes, or a number with KB, MB or GB (powers of 1000; default: 5GB)"
    add("--shard-size", default="5GB", metavar="SIZE", help=size)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Export, and print the folder that was written."""
    shard_size = bytes_of(arguments.shard_size)
    check_checkpoint(arguments.checkpoint)
    from fairseq_hash.export.hf import export

    export(arguments.checkpoint, arguments.out, arguments.data, arguments.sentencepiece, shard_size)
    print(f"wrote {arguments.out}")


def bytes_of(size: str) -> int:
    """Return a size in bytes; raise `UserError` if it is not a size."""
    found = re.fullmatch(r"(\d+)\s*([KMG]B|)", size.strip().upper())
    if found is None or int(found[1]) == 0:
        raise UserError(f"--shard-size {size} is no size; give bytes, or a number with KB, MB or GB, such as 5GB")
    return int(found[1]) * UNITS[found[2]]
