"""What a training or an evaluation says when it starts: no warnings that its user cannot act on, no wrong numbers."""

import ast
import contextlib
import logging
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import FullyShardedDataParallel
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from torch import nn

from fairseq_hash.fairseq_patches.command_log import CommandLog
from fairseq_hash.fairseq_patches.registry import override, replacement
from fairseq_hash.moe.parameter_counts import count_experts, count_trained_experts, layers_and_dense, whole_size


@replacement("warnings", "filters")
def _ignore_warnings(original: list[Any]) -> list[Any]:
    """Leave out the warnings that fairseq 0.12.2 earns from newer versions of torch, by their text or their place.

    Upstream: fairseq pins its batches in memory with and without a GPU; its tasks call `torch.cuda.amp.autocast`; its
    attention hands a boolean and a float mask to torch. All three do what they did. The filters stay as long as
    fairseq's code does, which is to the end of the process.
    """
    ignore = warnings.filterwarnings
    ignore("ignore", "'pin_memory' argument is set as true but no accelerator is found", UserWarning)
    ignore("ignore", "Support for mismatched key_padding_mask and attn_mask is deprecated", UserWarning)
    ignore("ignore", category=FutureWarning, module=r"(fairseq|fairseq_cli|fairscale)\.")
    return warnings.filters


@override("fairseq.dataclass.utils", "initialize")
def _leave_out_hydra(original: Callable[..., Any], config_path: str) -> Any:
    """Do nothing: `_compose_by_assignment` does without Hydra."""
    return contextlib.nullcontext()


@override("fairseq.dataclass.utils", "compose")
def _compose_by_assignment(
    original: Callable[..., Any], config_name: str, overrides: list[str], strict: bool
) -> DictConfig:
    """Put a command's flags into the configuration one by one: the same configuration, in a tenth of the time.

    Upstream: `convert_namespace_to_omegaconf` writes some 330 flags as text, and Hydra parses this and merges what it
    finds. That is most of the processor time of a short command. Hydra 1.3 also gives twenty lines of advice.
    """
    store, config = ConfigStore.instance(), OmegaConf.structured(FairseqConfig)
    for text in overrides:
        key, _, value = text.partition("=")
        if "." in key:
            OmegaConf.update(config, key, _read_value(value), merge=False)
        else:
            config[key] = store.load(f"{key}/{value}.yaml").node
    return config


def _read_value(text: str) -> Any:
    """Return the value that fairseq has written for Hydra: a text in quotes, null, or as Python writes it."""
    if text.startswith("'"):
        return text[1:-1].replace(r"\'", "'")
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return None if text == "null" else text  # a name of a choice, or inf, which the field makes a number


@replacement("fairseq_cli.train", "logger")
def _correct(original: logging.Logger) -> CommandLog:
    """Correct what a training says of the model and the machine before it trains.

    Upstream: a parameter counts as an expert's if ranks hold different experts, so that a model whose experts are on
    one rank is said to have none, and else those of other ranks are left out. A CPU counts as a GPU.
    """
    return CommandLog(original, Corrections())


class Corrections:
    """What to say in place of a message of `main` in fairseq_cli/train.py, which logs configuration and model first."""

    def __init__(self) -> None:
        self.model: Callable[[], nn.Module | None] = lambda: None
        self.is_on_cpu = False

    def __call__(self, said: Any) -> Any:
        """Return what to say; None: nothing."""
        if isinstance(said, nn.Module):
            self.model = weakref.ref(said)
        elif isinstance(said, DictConfig):
            self.is_on_cpu = said.common.cpu or not torch.cuda.is_available()
        elif isinstance(said, str) and said.startswith(("num. shared model params", "num. expert model params")):
            return self._counted(said, "expert" in said)
        elif isinstance(said, str) and self.is_on_cpu:
            return said.replace("devices (GPUs/TPUs)", "CPU processes")
        return said

    def _counted(self, said: str, of_experts: bool) -> "str | None":
        """Return the numbers of all ranks; None if there are no experts to speak of."""
        model = self.model()
        layers, dense = layers_and_dense(model) if model is not None else ([], [])
        if not layers or isinstance(model, FullyShardedDataParallel):
            return None if of_experts and "params: 0 " in said else said
        if of_experts:
            name, total, trained = "expert", count_experts(layers), count_trained_experts(layers)
        else:
            name, total = "shared", sum(map(whole_size, dense))
            trained = sum(whole_size(parameter) for parameter in dense if parameter.requires_grad)
        return f"num. {name} model params: {total:,} (num. trained: {trained:,})"
