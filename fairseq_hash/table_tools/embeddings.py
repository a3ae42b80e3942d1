"""Embeddings of a trained checkpoint, for clusters of tokens. Shape suffixes: see `moe.losses`."""

from pathlib import Path

from torch import Tensor

from fairseq_hash.checkpoint.mainfile import read_main
from fairseq_hash.checkpoint.manifest import Manifest
from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing import dictionary_fingerprint

NAME = "decoder.embed_tokens.weight"


def read_embeddings(path: Path, symbols: list[str]) -> tuple[Tensor, bool]:
    """Return a checkpoint's input embeddings, and whether they are known to belong to this dictionary.

    `path` is the main file of a dense or sparse model, or a checkpoint of fairseq's transformer_lm, whose own files do
    not name their dictionary. Returns float32 `[V, D]`. Raises `UserError` if the file is missing, damaged, without
    embeddings, or of another dictionary.
    """
    state = read_main(path)
    embedding_VD = state["model"].get(NAME)
    if embedding_VD is None or embedding_VD.dim() != 2:
        raise UserError(f"{path} has no {NAME}; give a checkpoint of a language model without adaptive inputs")
    if len(embedding_VD) != len(symbols):
        raise UserError(
            f"{path} has embeddings of {len(embedding_VD)} symbols, but the dictionary has {len(symbols)};  give a "
            "checkpoint that was trained with this dictionary"
        )
    if not embedding_VD.isfinite().all():
        raise UserError(f"{path} has embeddings that are not finite; give another checkpoint")
    fingerprint = _fingerprint(state, path)
    if fingerprint not in (None, dictionary_fingerprint(symbols)):
        raise UserError(
            f"{path} belongs to dictionary {fingerprint[:12]}, this one is {dictionary_fingerprint(symbols)[:12]}; "
            "give a checkpoint that was trained with this dictionary"
        )
    return embedding_VD.detach().float(), fingerprint is not None


def _fingerprint(state: dict, path: Path) -> "str | None":
    """Return the dictionary's fingerprint from the manifest, or else from a hash table's buffer."""
    manifest = Manifest.of(state, path)
    if manifest is not None:
        return manifest.dictionary_fingerprint
    buffers = [value for name, value in state["model"].items() if name.endswith(".dictionary_fingerprint")]
    return bytes(buffers[0].tolist()).hex() if buffers else None
