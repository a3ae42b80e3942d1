"""What a training or an evaluation says when it starts: no warnings that its user cannot act on, no wrong numbers."""

import logging
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from fairseq.dataclass import utils as dataclass_utils
from omegaconf import DictConfig
from torch import nn

from fairseq_hash.fairseq_patches.registry import override


def ignore_warnings() -> None:
    """Leave out the warnings that fairseq 0.12.2 earns from newer versions of torch, by their text or their place.

    Upstream: fairseq pins its batches in memory with and without a GPU; its tasks call `torch.cuda.amp.autocast`; its
    attention hands a boolean and a float mask to torch. All three do what they did.
    """
    ignore = warnings.filterwarnings
    ignore("ignore", "'pin_memory' argument is set as true but no accelerator is found", UserWarning)
    ignore("ignore", "Support for mismatched key_padding_mask and attn_mask is deprecated", UserWarning)
    ignore("ignore", category=FutureWarning, module=r"(fairseq|fairseq_cli|fairscale)\.")


@override(dataclass_utils, "initialize")
def _initialize_quietly(original: Callable[..., Any], config_path: str) -> Any:
    """Leave out Hydra's advice to the authors of fairseq.

    Upstream: `convert_namespace_to_omegaconf`, by which fairseq's commands read their flags, asks Hydra as one asks its
    version 1.0. It does what it did, and Hydra 1.3 says twenty lines about it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return original(config_path=config_path, caller_stack_depth=3)  # Hydra takes the path from its caller's folder


@override(dataclass_utils, "compose")
def _compose_quietly(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Leave out Hydra's advice, as `_initialize_quietly` does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return original(*args, **kwargs)


class _Corrected(logging.Filter):
    """Correct what `main` in fairseq_cli/train.py says of the model and the machine before it trains.

    Upstream: a parameter counts as an expert's where ranks hold different experts, so that a model whose experts are on
    one rank is said to have none, and else those of other ranks are left out. A CPU counts as a GPU. The model and the
    configuration are known here because `main` logs both first.
    """

    model: Callable[[], "nn.Module | None"] = staticmethod(lambda: None)
    is_on_cpu = False

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.msg
        if isinstance(said, nn.Module):
            self.model = weakref.ref(said)
        elif isinstance(said, DictConfig):
            self.is_on_cpu = said.common.cpu or not torch.cuda.is_available()
        elif isinstance(said, str) and said.startswith(("num. shared model params", "num. expert model params")):
            return self._correct_count(record, "expert" in said)
        elif isinstance(said, str) and self.is_on_cpu:
            record.msg = said.replace("devices (GPUs/TPUs)", "CPU processes")
        return True

    def _correct_count(self, record: logging.LogRecord, of_experts: bool) -> bool:
        """Put in the numbers of all ranks; return whether there is anything to say."""
        from fairseq_hash.lm.model import HashTransformerLanguageModel, layers_and_dense, whole_size

        model = self.model()
        if not isinstance(model, HashTransformerLanguageModel):  # such as one that fairscale has sharded
            return not of_experts or "params: 0 " not in record.msg
        layers, dense = layers_and_dense(model)
        if of_experts:
            sizes = [(layer.parallel.num_experts * layer.expert_size, _is_trained(layer.experts)) for layer in layers]
        else:
            sizes = [(whole_size(parameter), parameter.requires_grad) for parameter in dense]
        total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
        name = "expert" if of_experts else "shared"
        record.msg = f"num. {name} model params: {total:,} (num. trained: {trained:,})"
        return not of_experts or total > 0


def _is_trained(experts: nn.Module) -> bool:
    return all(parameter.requires_grad for parameter in experts.parameters())


logging.getLogger("fairseq_cli.train").addFilter(_Corrected())
