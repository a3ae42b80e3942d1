"""Small trained models for the tests of what looks at models: each trained by fairseq's trainer in this process."""

import functools
import tempfile
from pathlib import Path

import plugin
import recorded
import sentencepiece
from fairseq import checkpoint_utils

import fairseq_hash

LAYERS = ("--sparse-layers", "0,1", "--num-experts", "4")
# Every way in which a token finds its experts.
OPTIONS = {
    "hash": ("--router", "hash", *LAYERS),
    "per layer": ("--router", "hash", "--hash-per-layer", *LAYERS),
    "bigram": (*"--router hash --hash-table random --hash-feature bigram --hash-buckets 50".split(), *LAYERS),
    "history": (*"--router hash --hash-table random --hash-feature history --hash-length 2".split(), *LAYERS),
    "position": ("--router", "hash", "--hash-feature", "position", "--hash-table", "random", *LAYERS),
    "multi": ("--router", "hash", "--multi-hash", "2", *LAYERS),
    "several": ("--router", "hash", "--experts-per-token", "2", *LAYERS),
    "learned": ("--router", "hash", "--experts-per-token", "2", "--hash-weights", "learned", *LAYERS),
    "switch": ("--router", "switch", *LAYERS),
    "base": ("--router", "base", *LAYERS),
    "insert": ("--router", "base", "--sparse-placement", "insert", "--expert-sublayers", "2", *LAYERS),
    "mixed": ("--router", "hash,switch", *LAYERS),
    "none": (),
}


def train(data, folder, *options, updates=3):
    """Train a small model and return its checkpoint."""
    words = ("--max-tokens", "128", "--save-dir", str(folder), *map(str, options))
    trainer, iterator = recorded.make_trainer(data, words)
    recorded.run(trainer, iterator, updates)
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, iterator, 1.0)
    return Path(folder) / "checkpoint_last.pt"


@functools.cache
def checkpoint(data, name):
    """Return the checkpoint of a kind of `OPTIONS`, trained once."""
    folder = tempfile.mkdtemp(prefix=f"a {name} model ", dir=Path(data).parent)
    return train(data, folder, "--lr", "0.05", *OPTIONS[name])


@functools.cache
def loaded(data, name):
    """Return the model of a kind of `OPTIONS`."""
    return fairseq_hash.load(checkpoint(data, name))


@functools.cache
def pieces(data):
    """Return a folder of binarized data whose tokens are SentencePiece pieces, with the model beside `dict.txt`."""
    from data_prep.pieces import train_model

    folder = Path(tempfile.mkdtemp(prefix="a corpus of pieces ", dir=Path(data).parent))
    lines = (Path(data).parent / "train.txt").read_text().splitlines()[:200] + ["a naïve café"] * 5
    (folder / "text").write_text("\n".join(lines) + "\n", encoding="utf-8")
    train_model(folder / "text", folder / "sentencepiece.model", 330)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.model"))
    words = [" ".join(processor.encode(line, out_type=str)) for line in lines]
    # Every piece once, so that the dictionary has all: the bytes of rare characters, too.
    words.append(" ".join(processor.id_to_piece(number) for number in range(3, processor.get_piece_size())))
    (folder / "pieces").write_text("\n".join(words) + "\n", encoding="utf-8")
    prefixes = [f"--{split}pref={folder / 'pieces'}" for split in ("train", "valid")]
    plugin.command("preprocess", "--only-source", *prefixes, "--destdir", folder / "bin")
    (folder / "sentencepiece.model").rename(folder / "bin" / "sentencepiece.model")
    return folder / "bin"


@functools.cache
def checkpoint_of_pieces(data):
    """Return the checkpoint of a small hash model of pieces, and their folder."""
    folder = pieces(data)
    return train(folder, folder.parent / "model", "--tokens-per-sample", "32", *OPTIONS["hash"]), folder
