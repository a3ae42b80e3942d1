"""`fairseq-hash export CKPT --to hf DIR`: the folder that transformers loads, whole or not at all."""

import json
import os
import shutil
from pathlib import Path

from fairseq_hash.checkpoint.inspection import facts
from fairseq_hash.checkpoint.loading import loading_weights_only, read_checkpoint
from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import atomic_write
from fairseq_hash.export.card import model_card
from fairseq_hash.export.config import MODELING, TOKENIZATION, Model, model_of
from fairseq_hash.export.tensors import write_weights
from fairseq_hash.export.tokens import Tokens, find_tokens


def export(
    checkpoint: Path, out: Path, data: "Path | None" = None, pieces: "Path | None" = None, shard_size: int = 5 * 10**9
) -> None:
    """Write a checkpoint's model as a folder for transformers.

    Experts in shards are read one at a time, so memory holds the dense part and one expert. The optimizer is not read.

    `out` must not exist, and appears when it is complete. `data` is the folder of the dictionary and of the
    SentencePiece model, None for that of the training; `pieces` is the SentencePiece model, None for that in the folder
    of the data. `shard_size` is the most bytes of tensors in one file of weights; a larger tensor has a file of its
    own. Raises `UserError` if the checkpoint is damaged or cannot be exported, its dictionary is not found, or the
    folder cannot be written. Nothing of the folder is left then.
    """
    _check_out(out)
    with loading_weights_only():
        state = read_checkpoint(checkpoint)
    known = facts(checkpoint, state)
    model = model_of(checkpoint, state)
    rows = model.config["vocab_size"]
    tokens = find_tokens(checkpoint, state, known["dictionary_fingerprint"], rows, data, pieces)
    try:
        with atomic_write(out) as partial:
            partial.mkdir()
            _write(partial, model, tokens)
            (partial / "README.md").write_text(model_card(out.name, model, tokens, known), encoding="utf-8")
            write_weights(model.tensors, partial, shard_size)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror or error}); make room, or give another folder"
        ) from error


def _check_out(out: Path) -> None:
    """Raise `UserError` unless the folder can be made, before work begins."""
    if os.path.lexists(out):
        raise UserError(f"{out} exists; give a folder that does not exist yet")
    if not out.parent.is_dir():
        raise UserError(f"{out}: the folder {out.parent} does not exist; make it first")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"{out}: the folder {out.parent} is not writable; give a folder in another one")


def _write(folder: Path, model: Model, tokens: Tokens) -> None:
    """Write everything but weights and model card."""
    here = Path(__file__).parent
    for module in (MODELING, TOKENIZATION):
        shutil.copyfile(here / f"{module}.py", folder / f"{module}.py")
    tokens.write(folder, model.config["max_position_embeddings"])
    # Padding is never generated, as in fairseq's generator.
    generation = {**tokens.config, "suppress_tokens": [tokens.config["pad_token_id"]]}
    for name, content in (("config", {**model.config, **tokens.config}), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
