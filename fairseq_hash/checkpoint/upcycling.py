"""A sparse model that starts from a trained dense one: every expert begins as the FFN of its layer.

Sparse Upcycling (Komatsuzaki et al. 2023). Where nothing weighs the experts' output (hash layers), or where the experts
are an extra residual stack that starts at zero (`--sparse-placement insert`), the model computes what the dense one
does.
"""

import logging
import re
from typing import Any

from torch import Tensor, nn

from fairseq_hash.checkpoint.loading import one_line, read_checkpoint
from fairseq_hash.checkpoint.manifest import expert_tensors
from fairseq_hash.core.errors import UserError
from fairseq_hash.moe.experts import ExpertStack
from fairseq_hash.moe.layer import SparseLayer

logger = logging.getLogger(__name__)


def start_from_dense(model: Any, path: str) -> None:
    """Load the dense checkpoint at `path` into a sparse model; routers, tables and memories stay as they are.

    Raises:
        UserError: where the file cannot be used, is of a sparse model, or does not fit the model's sizes.
    """
    saved = read_checkpoint(path)["model"]
    if expert_tensors(saved, saved.manifest):
        raise UserError(f"--from-dense {path} is a sparse model already; use --finetune-from-model")
    state = expand_dense(saved, model)
    # The model's own `load_state_dict` waits for the other ranks; this one does not.
    try:
        missing, unexpected = nn.Module.load_state_dict(model, state, strict=False)
    except RuntimeError as error:
        raise UserError(f"--from-dense {path} does not fit this model: {one_line(error)}") from error
    except UserError as error:
        raise UserError(f"--from-dense {path}: {error}") from error
    missing = [name for name in missing if not re.search(r"\.(sparse|hash_tables|memory|memory_rows)\.", name)]
    if missing or unexpected:
        what = f"it lacks {missing[0]}" if missing else f"it has {unexpected[0]}"
        raise UserError(f"--from-dense {path} does not fit this model: {what}; give the sizes of the dense model")
    for module in model.modules():
        if isinstance(module, ExpertStack):  # an inserted one; its weights start at zero, and now its biases
            for name, parameter in module.feed_forward.named_parameters():
                if name.endswith("fc2_bias"):
                    nn.init.zeros_(parameter)
        elif isinstance(module, SparseLayer) and module.shared is not None:  # the routed experts are what the FFN was
            shared: Any = module.shared
            nn.init.zeros_(shared.fc2_weight)
            nn.init.zeros_(shared.fc2_bias)
    options = model.decoder.options
    weighs = options.hash_scale != 1 or (set(options.routers) != {"hash"} and options.gate == "value")
    if options.sparse_placement == "replace" and weighs:
        logger.warning("the router weighs what the experts return: the first loss is not that of the dense model")
    if options.expert_layer_norm:
        logger.warning("the dense model has no --expert-layer-norm: the first loss is not that of the dense model")


def expand_dense(dense: "dict[str, Tensor]", model: Any) -> dict[str, Any]:
    """Return a dense model's state with the names and shapes of a sparse one; experts share the memory of their FFN."""
    layers = model.decoder.layers
    places = [place for place, layer in enumerate(layers) if hasattr(layer, "self_attn")]
    state: dict[str, Any] = {}
    for name, tensor in dense.items():
        found = re.fullmatch(r"decoder\.layers\.(\d{1,9})\.(.*)", name)
        if found is None or int(found[1]) >= len(places):
            state[name] = tensor
            continue
        place = places[int(found[1])]
        rest = found[2]
        sparse = getattr(layers[place], "sparse", None)
        if sparse is not None and rest.startswith(("fc1.", "fc2.")):
            rest = f"sparse.experts.{rest.replace('.', '_')}"
            tensor = tensor.expand(sparse.parallel.num_experts, *tensor.shape)
        state[f"decoder.layers.{place}.{rest}"] = tensor
    return state
