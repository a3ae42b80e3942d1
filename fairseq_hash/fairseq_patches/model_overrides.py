"""What `--model-overrides` may name: options that a checkpoint has."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from fairseq.dataclass.configs import FairseqConfig
from omegaconf import DictConfig, open_dict

from fairseq_hash.core.errors import UserError
from fairseq_hash.fairseq_patches.registry import override
from fairseq_hash.options.sparse_options import SparseOptions

_from_hub = False


@override("fairseq.hub_utils", "from_pretrained")
def _hub_has_options_of_its_own(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Let fairseq's hub give what it likes: its keys are those of tokenizers, too, which no model has."""
    global _from_hub
    before, _from_hub = _from_hub, True
    try:
        return original(*args, **kwargs)
    finally:
        _from_hub = before


@override("fairseq.checkpoint_utils", "overwrite_args_by_name", one_line=True)
def _name_unknown_overrides(original: Callable[..., None], config: DictConfig, overrides: Mapping[str, Any]) -> None:
    """Refuse an override that is no option of the checkpoint; one of ours that is newer than the checkpoint acts.

    Upstream: `load_checkpoint_to_cpu` in fairseq/checkpoint_utils.py goes through the saved options and takes those
    that an override names; what no option is called is left out without a word.
    """
    model = config.get("model")
    if isinstance(model, DictConfig) and "sparse_layers" in model:
        with open_dict(model):
            for option in fields(SparseOptions):
                model.setdefault(option.name, option.default)
    known = {*keys_of(config), *FairseqConfig.__dataclass_fields__}
    for group in FairseqConfig.__dataclass_fields__.values():  # of the command, which may be newer as well
        known.update(getattr(group.type, "__dataclass_fields__", ()))
    unknown = [] if _from_hub else sorted(set(overrides) - known)
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), sorted(known), n=3)
        hint = f"near: {', '.join(near)}" if near else "it has the options of its training"
        raise UserError(f"--model-overrides: {unknown[0]} is no option of this checkpoint; {hint}")
    original(config, overrides)


def keys_of(config: DictConfig) -> Iterator[str]:
    """Yield the names of all options and groups in a configuration."""
    for key in config:
        yield str(key)
        if key in config and isinstance(config[key], DictConfig):  # not one that is missing
            yield from keys_of(config[key])
