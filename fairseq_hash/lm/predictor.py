"""What a trained language model predicts to follow each token: the keys of the hash feature `predicted`."""

import hashlib
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.tasks import FairseqTask
from torch import Tensor, nn

from fairseq_hash.core.errors import UserError


class Predictor:
    """A frozen language model.

    It is no module: the model that asks it neither trains nor saves it, nor changes its precision, so that it predicts
    the same in training and in evaluation.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        digest = hashlib.sha256()
        for name, parameter in sorted(model.named_parameters()):  # buffers of fairseq's are in part uninitialised
            digest.update(name.encode() + parameter.float().contiguous().numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    @torch.no_grad()
    def __call__(self, token_BL: Tensor) -> Tensor:
        """Return the most probable next token of each (int64 `[B, L]`), in fp32."""
        if next(self.model.parameters()).device != token_BL.device:
            self.model.to(token_BL.device)
        with torch.autocast(token_BL.device.type, enabled=False):
            return self.model(token_BL)[0].argmax(dim=-1)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Predictor":
        """Return the same object: it never changes."""
        return self


def load_predictor(path: str, task: FairseqTask) -> Predictor:
    """Load the language model at `path`.

    Raises:
        UserError: where there is none that fits the task's dictionary.
    """
    try:
        models, _ = checkpoint_utils.load_model_ensemble([path], task=task)
    except (OSError, SystemExit, UserError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].removeprefix("fairseq_hash: ")
        raise UserError(f"--hash-predictor {path} cannot be used: {reason}; give a trained language model") from error
    model = models[0]
    rows = model.decoder.embed_tokens.num_embeddings
    if rows != len(task.source_dictionary):
        raise UserError(
            f"--hash-predictor {path} has {rows} symbols, this data {len(task.source_dictionary)}; "
            "give a model with the same dictionary"
        )
    return Predictor(model)
