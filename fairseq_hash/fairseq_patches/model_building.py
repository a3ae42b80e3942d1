"""Building a model."""

from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any

from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_REGISTRY, transformer_lm

from fairseq_hash.fairseq_patches.registry import override, replaced


class ForEvaluation:
    """A task for which a model is built that takes its weights from a checkpoint and is not trained.

    Such a model holds all experts on every rank: ranks call it unequally often, and one that waits for the others would
    wait for ever. Its hash table is the checkpoint's.
    """

    def __init__(self, task: Any) -> None:
        self.task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)


@override("fairseq.models", "build_model")
def _say_what_for(original: Callable[..., Any], cfg: Any, task: Any, from_checkpoint: bool = False) -> Any:
    """Tell our model whether it is to be evaluated.

    Upstream: `load_model_ensemble_and_task` says `from_checkpoint` to the task, and `build_model` in
    fairseq/models/__init__.py does not hand it on to the model.
    """
    name = getattr(cfg, "_name", None) or getattr(cfg, "arch", None)
    is_ours = ARCH_MODEL_REGISTRY.get(name) is MODEL_REGISTRY["hash_transformer_lm"]
    return original(cfg, ForEvaluation(task) if from_checkpoint and is_ours else task, from_checkpoint)


def language_model_decoder(decoder_class: Callable[..., Any]) -> AbstractContextManager[None]:
    """Let `TransformerLanguageModel.build_model` build `decoder_class`.

    Upstream: fairseq/models/transformer_lm.py names `TransformerDecoder` in the body of `build_model`, between forty
    lines about embeddings and positions that a subclass wants unchanged. Copying them would fork them.
    """
    return replaced(transformer_lm, "TransformerDecoder", decoder_class)


def allow_bf16_without_tpu(args: Namespace) -> None:
    """Undo that `--bf16` (and `--memory-efficient-bf16`) switch to a TPU where no TPU library is installed.

    Upstream: `parse_args_and_arch` in fairseq/options.py sets `args.tpu` whenever `args.bf16` is set, so that bf16 on a
    GPU or CPU stops with a missing torch_xla; through Hydra it works. An architecture function runs after that line
    (and once more with the model's own options alone, which have no `bf16`).
    """
    if hasattr(args, "bf16") and args.bf16 and find_spec("torch_xla") is None:
        args.tpu = False


def set_architecture(name: str, function: Callable[[Namespace], None]) -> None:
    """Replace the architecture function of a registered model.

    Upstream: `register_model` gives every model with a dataclass an architecture of its own name that does nothing, and
    `register_model_architecture` refuses a second one.
    """
    ARCH_CONFIG_REGISTRY[name] = function
