"""Loading: a state in which experts stand as `SavedExperts`, of which each rank reads its own."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fairseq_hash.checkpoint.expert_loading import fit_experts
from fairseq_hash.checkpoint.expert_state import expert_numbers, is_per_element, optimized
from fairseq_hash.checkpoint.mainfile import read_main
from fairseq_hash.checkpoint.manifest import Manifest
from fairseq_hash.checkpoint.sharded_tensor import SavedExperts, open_shards, saved_tensors, take
from fairseq_hash.core.errors import UserError
from fairseq_hash.core.fields import fits
from fairseq_hash.parallel.collectives import run_on_all_ranks
from fairseq_hash.parallel.groups import ExpertParallel

if TYPE_CHECKING:  # checkpoints are read, merged and shown without fairseq
    from fairseq.optim import FairseqOptimizer

_with_optimizer = True


@contextmanager
def loading_weights_only(is_needed: bool = True) -> Iterator[None]:
    """Leave the optimizer's shards unread in this context, where that `is_needed`: they may be missing."""
    global _with_optimizer
    before, _with_optimizer = _with_optimizer, _with_optimizer and not is_needed
    try:
        yield
    finally:
        _with_optimizer = before


class SavedState(dict):
    """A model's state that remembers its file and its manifest."""

    def __init__(self, state: Mapping[str, Any], path: str, manifest: "Manifest | None") -> None:
        super().__init__(state)
        self.path, self.manifest = path, manifest


def read_checkpoint(path: "str | os.PathLike[str]", is_checked: bool = True) -> dict[str, Any]:
    """Read a checkpoint's main file and open its shards; no expert is read yet.

    A plain checkpoint holds its experts itself. With `is_checked` the file is compared with its checksums first.

    Raises:
        UserError: where a file is missing, damaged or another one.
    """
    while True:
        before = Path(path).stat() if Path(path).exists() else None
        state = read_main(path, is_checked)
        manifest = Manifest.of(state, path)
        try:
            return _with_saved_experts(state, path, manifest)
        except UserError:
            # A training may have put a newer file in its place by now, and removed the shards of this one.
            if before is None or not Path(path).exists() or os.path.samestat(before, Path(path).stat()):
                raise


def _with_saved_experts(
    state: dict[str, Any], path: "str | os.PathLike[str]", manifest: "Manifest | None"
) -> dict[str, Any]:
    weights = dict(state["model"])
    if manifest is not None and manifest.shards:
        folder = Path(path).parent
        weights.update(saved_tensors(open_shards(folder, manifest, "weights")))
        if _with_optimizer and manifest.numbers:
            optimizer: Any = (state.get("last_optimizer_state") or {}).get("state")
            for name, value in saved_tensors(open_shards(folder, manifest, "optimizer")).items():
                parameter, _, key = name.rpartition("/")
                number = manifest.numbers.get(parameter)
                if not fits(optimizer, dict[Any, dict[str, Any]]) or number not in optimizer:
                    raise UserError(f"{path} has no optimizer state of {parameter}; use another checkpoint")
                optimizer[number][key] = value
    state["model"] = SavedState(weights, str(path), manifest)
    return state


def one_line(error: RuntimeError) -> str:
    """Return torch's list of what does not fit a model in one line, cut to the first few."""
    lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()] or [str(error)]
    more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
    return "; ".join(line.rstrip(".")[:300] for line in lines[:2]) + more


def loading_own_state(
    optimizer: "FairseqOptimizer", model: nn.Module, parallel: "ExpertParallel | None", load: Callable[..., None]
) -> Callable[..., None]:
    """Return `load`, an optimizer's `load_state_dict`, made to read this rank's share of a state of all experts.

    It raises `UserError` on every rank where one finds that the state is damaged or does not fit.
    """

    def call(state: dict[str, Any], *args: Any) -> None:
        load(run_on_all_ranks(lambda: _own_state(state, optimizer, model, parallel)), *args)

    return call


def _own_state(
    state: dict[str, Any], optimizer: "FairseqOptimizer", model: nn.Module, parallel: "ExpertParallel | None"
) -> dict[str, Any]:
    parameters = optimized(optimizer.optimizer)
    saved = sum(len(group["params"]) for group in state["param_groups"])
    if saved != len(parameters):
        raise UserError(
            f"the optimizer's state is one of {saved} tensors, this training has {len(parameters)} (--fp16 makes one "
            "of all); resume with the options of the checkpoint, or add --reset-optimizer"
        )
    experts = set(expert_numbers(optimizer, model).values())
    own: dict[Any, Any] = {}
    for number, values in state["state"].items():
        own[number] = dict(values)
        for key, value in values.items():
            own[number][key] = _own_value(value, parallel if number in experts else None, parameters[number])
    return {**state, "state": own}


def _own_value(value: Any, parallel: "ExpertParallel | None", parameter: nn.Parameter) -> Any:
    """Return what an optimizer is to hold for a parameter; `parallel` is None where that is no expert's."""
    if isinstance(value, SavedExperts):
        if parallel is None:
            raise UserError("the optimizer's state belongs to other parameters; add --reset-optimizer")
        fit_experts(value, parallel, parameter.shape[1:], "the optimizer's state")
        return value.read(parallel.expert_ids, parameter.device)
    if not torch.is_tensor(value):
        return value
    if parallel is not None and value.dim() and is_per_element(value, torch.Size((len(value), *parameter.shape[1:]))):
        fit_experts(value, parallel, parameter.shape[1:], "the optimizer's state")
        value = take(value, parallel.expert_ids)
    # What was read lies in the file's memory, which is not there to train in.
    return value.clone()


def place_in_epoch(iterator: dict[str, Any], num_shards: int) -> tuple[dict[str, Any], int]:
    """Return the state of a training's iterator for another number of ranks, and how many batches come again.

    fairseq counts the batches of one rank. Rank r of W takes batches r, r + W, ...: after n each, the first n x W are
    done. Where the new number of ranks does not divide that, the rest of a round comes again.
    """
    saved = iterator.get("num_shards", num_shards)
    done = iterator["iterations_in_epoch"] * saved
    return {**iterator, "iterations_in_epoch": done // num_shards, "num_shards": num_shards}, done % num_shards
