"""A training whose experts are monitored, with what a naive reference says of each measured update."""

import json
import math

import recorded
import torch
import torch.distributed as dist

from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.training.monitor_file import NAME


def experiment(data, words, updates):
    """Train, and return by update: norms, choices, drops and exchanged bytes of this rank, counted by loops."""
    trainer, epoch_itr = recorded.make_trainer(data, words)
    layers = [module for module in trainer.get_model().modules() if isinstance(module, SparseLayer)]
    seen, chosen = {}, {}
    for place, layer in enumerate(layers):
        watch(layer, chosen.setdefault(place, []), trainer.cfg.model.capacity_factor)
    clip_grad_norm, train_step = trainer.clip_grad_norm, trainer.train_step
    gradients = []

    def keep_gradients(clip_norm):
        gradients[:] = [norms(layer, lambda p: p.grad) for layer in layers]
        return clip_grad_norm(clip_norm)

    def keep(samples):
        before = layers[0].parallel.traffic.bytes
        result = train_step(samples)
        seen[trainer.get_num_updates()] = {
            "gradient": [list(of_layer) for of_layer in gradients],
            "weight": [norms(layer, lambda p: p.detach()) for layer in layers],
            "chosen": [[list(one) for one in chosen[place]] for place in range(len(layers))],
            "bytes": layers[0].parallel.traffic.bytes - before,
            "experts": list(layers[0].parallel.expert_ids),
        }
        for counts in chosen.values():
            counts.clear()
        return result

    trainer.clip_grad_norm, trainer.train_step = keep_gradients, keep
    recorded.run(trainer, epoch_itr, updates)
    return seen


def norms(layer, pick):
    """The norm of each of this rank's experts, value by value of its tensors."""
    result = []
    for expert in range(layer.parallel.local_experts):
        values = [value for p in layer.experts.parameters() for value in pick(p)[expert].double().flatten().tolist()]
        result.append(math.sqrt(math.fsum(value * value for value in values)))
    return result


def watch(layer, counts, factor):
    """Count choices and drops of each pass: tokens come one by one, and a full expert takes no more."""
    route = layer.route

    def counted(x_TD, context):
        result = route(x_TD, context)
        experts = layer.parallel.num_experts
        chosen, dropped, taken = [0] * experts, [0] * experts, {}
        choices = result[0].expert_TK.flatten().tolist()
        most = math.ceil(len(choices) * factor / experts / layer.segments) if factor else len(choices)
        for group in choices:
            expert = group // layer.segments
            dropped[expert] += taken.get(group, 0) >= most
            chosen[expert] += 1
            taken[group] = taken.get(group, 0) + 1
        counts.append((chosen, dropped))
        return result

    layer.route = counted


def monitored(data, words, updates, folder):
    """Be one rank: return what the reference saw, and the records of the file."""
    seen = experiment(data, (*words, "--save-dir", folder), updates)
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if dist.is_initialized():
        dist.barrier()
    with open(f"{folder}/{NAME}") as file:
        lines = [json.loads(line) for line in file]
    return {"seen": seen, "lines": lines if is_first else []}


def waits(data, words, updates):
    """Return how often the host waits for a value in each update."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found[-1] += function.__name__.startswith("_local_scalar_dense")
            return function(*args, **(kwargs or {}))

    trainer, epoch_itr = recorded.make_trainer(data, words)
    train_step = trainer.train_step

    def counted(samples):
        found.append(0)
        with Counting():
            return train_step(samples)

    trainer.train_step = counted
    recorded.run(trainer, epoch_itr, updates)
    return found


def folders(parent, *names):
    """Make folders, and return their paths as text."""
    paths = [parent / name for name in names]
    for path in paths:
        path.mkdir()
    return list(map(str, paths))


def same(one, other):
    """Whether two lists of numbers agree up to rounding."""
    return torch.allclose(torch.tensor(one).double(), torch.tensor(other).double(), rtol=1e-5, atol=1e-9)


def refused(data, words):
    """Return the line with which a training with fully sharded data parallel is refused."""
    import contextlib
    import io

    from training_ranks import let_fairscale_shard_on_a_cpu

    let_fairscale_shard_on_a_cpu()
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        recorded.make_trainer(data, words)
    return said.getvalue()


def train_and_die(data, words, saved, killed):
    """Train, save after an update, go on to another one, and be killed in it, before its end."""
    import os
    import signal

    from fairseq import checkpoint_utils

    trainer, epoch_itr = recorded.make_trainer(data, words)
    train_step = trainer.train_step

    def step(samples):
        if trainer.get_num_updates() == killed:
            trainer.optimizer.step = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
        result = train_step(samples)
        if trainer.get_num_updates() == saved:
            checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, 1.0)
        return result

    trainer.train_step = step
    recorded.run(trainer, epoch_itr, killed + 1)
