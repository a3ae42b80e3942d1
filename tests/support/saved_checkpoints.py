"""Checkpoints that tests of `fairseq-hash checkpoint` share, and how they look into them."""

import os
import shutil
import time

import ranks
import recorded
import torch
from called import call
from exactness import arguments
from fairseq import checkpoint_utils
from safetensors import safe_open

EXPERTS, LAYERS = 4, (0, 1)


def words(*more):
    """Return the arguments of the training."""
    return arguments("hash", EXPERTS, "adam", *more)


def save(data, given, updates):
    """Train and save; `ranks` runs it, and one process calls it."""
    trainer, epoch_itr = recorded.make_trainer(data, given)
    recorded.run(trainer, epoch_itr, updates)
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, 1.0)


def state_of(trainer):
    """Return parameters and Adam's moments by name."""
    state = {}
    for name, parameter in trainer.get_model().named_parameters():
        moments = trainer.optimizer.optimizer.state.get(parameter, {})
        state[name] = parameter.detach()
        state.update({f"{name} {key}": moments[key] for key in ("exp_avg", "exp_avg_sq") if key in moments})
    return state


def save_two(data, folder):
    """Make two checkpoints of one training: `two.pt` by two ranks, `four.pt` two updates later by one process."""
    ranks.run(2, "saved_checkpoints:save", str(data), words("--save-dir", str(folder)), 2)
    shutil.copy(folder / "checkpoint_last.pt", folder / "two.pt")
    save(data, words("--save-dir", str(folder)), 4)
    shutil.copy(folder / "checkpoint_last.pt", folder / "four.pt")
    return folder


def merge_two(saved, folder):
    """Make plain files of the two."""
    for name in ("two.pt", "four.pt"):
        done("merge", saved / name, "--out", folder / name)
    return folder


def done(verb, *rest):
    """Return what a call prints that does what it should."""
    status, out, err = call("checkpoint", verb, *rest)
    assert (status, err) == (0, ""), err
    return out


def load(path):
    """Return what a main file holds."""
    return torch.load(path, weights_only=True)


def tensors(path):
    """Return all tensors of a plain checkpoint by name, those of the optimizer's state as well."""
    state = load(path)
    optimizer = (state.get("last_optimizer_state") or {"state": {}})["state"]
    moments = {
        f"{number}/{key}": torch.as_tensor(value) for number, kept in optimizer.items() for key, value in kept.items()
    }
    return {**state["model"], **moments}


def plain(value):
    """Return a value with lists in the place of tensors."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value.tolist() if torch.is_tensor(value) else value


def assert_equal(one, other):
    """Check that two states have the same tensors."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


def in_shards(path, part):
    """Return what the shards of a checkpoint hold, by safetensors' own reader."""
    shards = [shard for shard in load(path)["fairseq_hash"]["shards"] if shard["part"] == part]
    parts = {}
    for shard in sorted(shards, key=lambda shard: shard["first"]):
        with safe_open(path.parent / shard["file"], "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dictionary)
                parts.setdefault(name, []).append(file.get_tensor(name))
    return {name: torch.cat(values) for name, values in parts.items()}, len(shards)


def wait_for(path):
    """Wait until a file is there."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def referenced(folder):
    """Return the names of the shards that the main files of a folder refer to."""
    names = set()
    for path in folder.glob("*.pt"):
        manifest = torch.load(path, weights_only=True)["fairseq_hash"]
        names.update(os.path.basename(shard["file"]) for shard in manifest["shards"])
    return names
