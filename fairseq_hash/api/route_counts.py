"""How often a trained model's router chose each expert for each token. Shape suffixes: see `moe.losses`."""

from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from fairseq_hash.api.language_model import LanguageModel
from fairseq_hash.api.routes import sparse_layers, watched
from fairseq_hash.core.errors import UserError
from fairseq_hash.table_tools.count_keys import samples

TOKENS = 4096  # that the model reads at once, if a sample is not longer


def layer_with_router(model: LanguageModel, number: "int | None" = None) -> int:
    """Return the number of the decoder layer whose router is counted: the given one, or the only one there is.

    Raises:
        UserError: if that layer has no router, or if there are several and none is given.
    """
    places = [place for place, _ in sparse_layers(model.model)]
    routed = {place.number: place.router for place in places if place.hash_route is None}
    named = ", ".join(f"{layer} ({router})" for layer, router in routed.items()) or "none"
    if number is None and len(routed) == 1:
        return next(iter(routed))
    if number is None:
        raise UserError(f"the model's layers with a router are {named}; give one by --layer")
    if number not in routed:
        raise UserError(f"--layer {number} has no router; the model's layers with a router are {named}")
    return number


def sample_length(model: LanguageModel, length: "int | None") -> int:
    """Return the tokens of a sample: those given, or those of the training.

    Raises:
        UserError: if the model does not read so many at once.
    """
    most = model.max_tokens + 1
    if length is None:
        length = min(model.task.args.tokens_per_sample or most, most)
    if not 1 <= length <= most:
        raise UserError(
            f"--tokens-per-sample {length} is out of range; give 1 to {most:,}, which the model reads at once"
        )
    return length


@torch.no_grad()
def count_routes(
    model: LanguageModel, blocks: Iterable[np.ndarray], number: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Count what the router of decoder layer `number` chooses in a text, before any capacity limit.

    The text is read after a start symbol and cut into samples, as in `fairseq-eval-lm`.

    Args:
        model: a trained model.
        blocks: the text's token ids in order, int64 each.
        number: of the decoder layer.
        length: tokens of a sample (`sample_length`).

    Returns:
        int64 `[V, E]`, how often each expert was chosen for each token; int64 `[V]`, how often the token occurred.
    """
    vocabulary, experts = len(model.dictionary), model.num_experts
    layer = next(layer for place, layer in sparse_layers(model.model) if place.number == number)
    chosen_VE, count_V = np.zeros((vocabulary, experts), dtype=np.int64), np.zeros(vocabulary, dtype=np.int64)
    for token_BL in text_batches(chain([np.array([model.start])], blocks), length):
        with watched(model.model) as decisions:
            model.model(token_BL.to(model.device))
        ((context, assignment, _),) = decisions[layer]
        token_T = context.select(token_BL.to(model.device)).cpu().numpy()
        np.add.at(chosen_VE, (token_T[:, None], assignment.expert_TK.cpu().numpy()), 1)
        np.add.at(count_V, token_T, 1)
    return chosen_VE, count_V


def text_batches(blocks: Iterable[np.ndarray], length: int) -> Iterator[Tensor]:
    """Yield a text as int64 `[B, L]`, samples of `length` tokens in order, as many as a model reads at once."""
    for token_BL, _ in samples(blocks, length):
        yield from torch.from_numpy(token_BL).split(max(TOKENS // length, 1))
