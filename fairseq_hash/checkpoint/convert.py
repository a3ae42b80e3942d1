"""Checkpoints made of checkpoints: merged into one plain file, split into shards, averaged.

Sources are read checked, and one result is written: shards first, then the main file, or nothing at all.
"""

import contextlib
import itertools
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_hash.checkpoint.directory import SHARDS, lock, shard_name
from fairseq_hash.checkpoint.expert_state import take_moments
from fairseq_hash.checkpoint.loading import loading_weights_only, read_checkpoint
from fairseq_hash.checkpoint.mainfile import cannot_write, read_main, write_main
from fairseq_hash.checkpoint.manifest import KEY, Manifest, expert_tensors, require_all_experts
from fairseq_hash.checkpoint.sharded_tensor import SavedExperts, take
from fairseq_hash.checkpoint.shards import write_shard
from fairseq_hash.core.errors import UserError
from fairseq_hash.provenance import now

OPTIMIZER = "last_optimizer_state"  # fairseq's key


def read(path: Path, with_optimizer: bool = True) -> tuple[dict[str, Any], "Manifest | None"]:
    """Read a checkpoint whose experts, where they are in shards, stand as `SavedExperts`, and its manifest.

    Without `with_optimizer` the optimizer's state is left out; its shards may be missing then.

    Raises:
        UserError: if a file is missing or damaged, or is one rank's share of a checkpoint.
    """
    with loading_weights_only(is_needed=not with_optimizer):
        state = read_checkpoint(path)
    manifest = Manifest.of(state, path)
    require_all_experts(state, manifest, path)
    state["model"] = dict(state["model"])  # plain, as torch loads nothing else without running code
    if not with_optimizer or not state.get(OPTIMIZER):
        state.pop(OPTIMIZER, None)  # as --no-save-optimizer-state leaves it out
        manifest = replace(manifest, numbers={}) if manifest is not None else None
    return state, manifest


def merge(source: Path, out: Path, with_optimizer: bool, is_average: bool = False) -> None:
    """Write a plain checkpoint, which holds all experts itself.

    With `is_average` its weights are the running average of the weights (`--store-ema`), and no optimizer's state is
    written.

    Raises:
        UserError: if the source cannot be used or has no such average, or `out` cannot be written.
    """
    state, manifest = read(source, with_optimizer and not is_average)
    if is_average:
        take_running_average(state, source)
    _read_in(state["model"])
    _read_in(state.get(OPTIMIZER) or {})
    _write_plain(state, manifest, out)


def take_running_average(state: dict[str, Any], path: Path) -> None:
    """Make the running average of the weights (`--store-ema`) the weights of a state, all experts among them.

    The optimizer's state, which is that of the weights as they were trained, goes.

    Raises:
        UserError: if the checkpoint at `path` has no such average.
    """
    extra = state.get("extra_state") or {}
    if "ema" not in extra:
        raise UserError(f"{path} has no running average of its weights; fairseq-train saves one with --store-ema")
    state["model"] = dict(extra["ema"])
    state["extra_state"] = {key: value for key, value in extra.items() if key not in ("ema", "ema_fp32_params")}
    state.pop(OPTIMIZER, None)
    manifest = Manifest.of(state, path)
    if manifest is not None:
        state[KEY] = replace(manifest, shards=(), numbers={}).to_plain()


def _read_in(values: dict[Any, Any]) -> None:
    """Put tensors in the place of `SavedExperts`."""
    for key, value in values.items():
        if isinstance(value, SavedExperts):
            values[key] = value.read_all()
        elif isinstance(value, dict):
            _read_in(value)


def split(source: Path, out: Path, num_shards: int) -> None:
    """Write a checkpoint whose experts are in `num_shards` shards, and their optimizer state in as many.

    Raises:
        UserError: if the source cannot be used, `num_shards` is not one of 1 to E, a training writes to the folder,
            or a file cannot be written.
    """
    state, manifest = read(source)
    if not expert_tensors(state["model"], manifest):
        raise UserError(f"{source} is a dense model, which has no experts to split; give a sparse one")
    if manifest is None:
        raise UserError(
            f"{source} has experts but no manifest of them, so which optimizer state is theirs is not known; load it "
            "with fairseq-train --restore-file, and split what that saves"
        )
    if not 1 <= num_shards <= manifest.num_experts:
        raise UserError(
            f"--shards {num_shards} is out of range; {source} has {manifest.num_experts} experts: give a number of 1 "
            f"to {manifest.num_experts}"
        )
    keep_trainings_out(out)
    cuts = [manifest.num_experts * number // num_shards for number in range(num_shards + 1)]
    _write_sharded(state, manifest, [range(*pair) for pair in itertools.pairwise(cuts)], out)


def average(sources: Sequence[Path], out: Path) -> None:
    """Write the mean of the weights of several checkpoints of one model; all else is that of the last one.

    The result has no optimizer state. It is sharded where the last one is.

    Raises:
        UserError: if a source cannot be used, they are of different models, a training writes to the folder of a
            sharded result, or a file cannot be written.
    """
    read_ones = [read(source, with_optimizer=False) for source in sources]
    state, manifest = read_ones[-1]
    for source, (_, other) in zip(sources, read_ones, strict=True):
        _check_same_model(source, other, sources[-1], manifest)
    if manifest is not None and manifest.shards:
        keep_trainings_out(out)
    experts = expert_tensors(state["model"], manifest)
    state["model"] = _mean_of_models([one["model"] for one, _ in read_ones], sources, experts)
    if manifest is not None:
        made = {**manifest.provenance, "date": now(), "average_of": [str(source) for source in sources]}
        manifest = replace(manifest, provenance=made)
    if manifest is not None and manifest.shards:
        _write_sharded(state, manifest, [shard.expert_ids for shard in manifest.part("weights")], out)
    else:
        _write_plain(state, manifest, out)


def _check_same_model(path: Path, manifest: "Manifest | None", last: Path, expected: "Manifest | None") -> None:
    """Compare what two manifests say of their models; where one is missing, the tensors are compared later."""
    if manifest is None or expected is None:
        return
    for field, what in (
        ("num_experts", "experts"),
        ("router", "router"),
        ("dictionary_fingerprint", "dictionary"),
        ("table_fingerprint", "hash table"),
    ):
        one, other = getattr(manifest, field), getattr(expected, field)
        if one != other:
            raise UserError(
                f"{path} has {what} {str(one)[:12]}, {last} has {str(other)[:12]}; give checkpoints of one model"
            )


def _mean_of_models(
    models: Sequence[Mapping[str, Any]], sources: Sequence[Path], experts: set[str]
) -> dict[str, Tensor]:
    last = models[-1]
    for source, model in zip(sources, models, strict=True):
        for name in model.keys() ^ last.keys():
            has, lacks = (source, sources[-1]) if name in model else (sources[-1], source)
            raise UserError(f"{has} has {name} and {lacks} does not; give checkpoints of one model")
    means: dict[str, Tensor] = {}
    tied: dict[tuple[Any, ...], Tensor] = {}  # embedding and output projection: one memory in the file, one mean
    for name in last:
        values = [model[name] for model in models]
        _check_same_kind(name, values, sources)
        memory = tuple((value.data_ptr(), value.shape) if isinstance(value, Tensor) else name for value in values)
        if memory not in tied:
            tied[memory] = _mean(values, by_expert=name in experts)
        means[name] = tied[memory]
    return means


def _check_same_kind(name: str, values: Sequence[Any], sources: Sequence[Path]) -> None:
    """Raise `UserError` unless a mean of these values can be made, or they are equal where it cannot."""
    last = values[-1]
    for source, value in zip(sources, values, strict=True):
        if value.shape != last.shape:
            shapes = f"shape {list(value.shape)} in {source} and {list(last.shape)} in {sources[-1]}"
            raise UserError(f"{name} has {shapes}; give checkpoints of one model")
        is_number = value.dtype.is_floating_point and last.dtype.is_floating_point
        if not is_number and (value.dtype != last.dtype or not torch.equal(value, last)):
            raise UserError(
                f"{name} differs in {source} and {sources[-1]}, and is nothing to average; give "
                "checkpoints of one model"
            )


def _mean(values: Sequence[Any], by_expert: bool) -> Tensor:
    """Return the mean of tensors or `SavedExperts` in the type of the last, sums in float64; experts one by one."""
    last = values[-1]
    if not last.dtype.is_floating_point:
        return last
    if not by_expert:
        return _mean_of_tensors(values).to(last.dtype)
    mean = torch.empty(last.shape, dtype=last.dtype)
    for row, rows in zip(mean, zip(*values, strict=True), strict=True):
        row.copy_(_mean_of_tensors(rows))
    return mean


def _mean_of_tensors(values: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(values[0].shape, dtype=torch.float64)
    for value in values:
        total += value
    return total / len(values)


def keep_trainings_out(out: Path) -> None:
    """Lock the folder of a sharded result: a training in it removes shards that no main file names yet.

    Raises:
        UserError: if a training has it.
    """
    try:
        lock(out.parent)
    except UserError:
        raise UserError(
            f"--out {out}: a training saves to {out.parent}, and would remove shards whose main file is not there yet; "
            "wait for its end or give a file in another folder"
        ) from None
    except OSError as error:
        raise UserError(cannot_write(out, error)) from error


def _write_plain(state: dict[str, Any], manifest: "Manifest | None", out: Path) -> None:
    if manifest is not None:
        state[KEY] = replace(manifest, shards=()).to_plain()
    write_main(state, out)


def _write_sharded(state: dict[str, Any], manifest: Manifest, ranges: Sequence[range], out: Path) -> None:
    """Write a state that has all experts, those of each range to a shard of their own.

    Raises:
        UserError: if a file cannot be written, or what is still to be read is damaged; no shard is left then.
    """
    save = uuid.uuid4().hex[:8]
    names = expert_tensors(state["model"], manifest)
    weights = {name: state["model"].pop(name) for name in list(state["model"]) if name in names}
    parts: dict[str, dict[str, Any]] = {"weights": weights, "optimizer": {}}
    if manifest.numbers:
        state[OPTIMIZER], parts["optimizer"] = take_moments(state[OPTIMIZER], manifest.numbers, weights)
    about = {"save": save, "update": manifest.update}
    shards = []
    folder = out.parent / SHARDS
    try:
        folder.mkdir(exist_ok=True)
        for part, tensors in parts.items():
            for experts in ranges if tensors else ():
                file = shard_name(manifest.update, save, part, experts)
                rows = {name: take(value, experts) for name, value in tensors.items()}
                shards.append(write_shard(out.parent, file, part, experts, rows, about))
        state[KEY] = replace(manifest, save=save, experts=tuple(sorted(weights)), shards=tuple(shards)).to_plain()
        write_main(state, out)
    except BaseException as error:
        if not _names_save(out, save):  # an interrupt may come when the main file has its name already
            for path in folder.glob(f"*.{save}.*"):
                path.unlink()
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        if isinstance(error, OSError):
            raise UserError(cannot_write(out, error)) from error
        raise


def _names_save(path: Path, save: str) -> bool:
    """Return whether a main file is that of a save."""
    try:
        manifest = Manifest.of(read_main(path, is_checked=False), path)
    except UserError:
        return False
    return manifest is not None and manifest.save == save
