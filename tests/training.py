"""Train with fairseq's own trainer in this process, and keep every number: what the tests of exactness compare."""

import contextlib
import io

import torch
from fairseq import checkpoint_utils, utils
from fairseq.data import iterators
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from plugin import build


def train(data, arguments, updates=20, update_freq=1):
    """Return losses, gradient norms, gradients and final parameters of a training, by update.

    `loss` is the sum over all tokens of all ranks. `gradients` are those that the optimizer got, clipped and scaled.
    """
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    shared = ("--distributed-world-size", world_size, "--distributed-rank", rank, "--ddp-backend", "legacy_ddp")
    fixed = ("--optimizer", "adam", "--lr", "1e-3", "--seed", "5", "--update-freq", update_freq, "--no-save")
    utils.set_torch_seed(5)
    metrics.reset()
    with contextlib.redirect_stderr(io.StringIO()):
        cfg, task, model, criterion = build(data, *shared, *fixed, *arguments)
    task.load_dataset("valid")
    trainer = Trainer(cfg, task, model, criterion)
    record = {"loss": [], "norm": [], "gradients": [], "validation": [], "dummies": 0}

    def reduce_metrics(logging_outputs, criterion, original=task.reduce_metrics):
        record["loss" if criterion.training else "validation"].append(
            sum(float(log["loss"]) for log in logging_outputs)
        )
        return original(logging_outputs, criterion)

    def clip(clip_norm, original=trainer.clip_grad_norm):
        record["norm"].append(original(clip_norm).item())
        return torch.tensor(record["norm"][-1])

    def prepare(sample, is_dummy=False, original=trainer._prepare_sample):
        record["dummies"] += is_dummy
        return original(sample, is_dummy)

    task.reduce_metrics, trainer.clip_grad_norm, trainer._prepare_sample = reduce_metrics, clip, prepare
    _, epoch_itr = checkpoint_utils.load_checkpoint(cfg.checkpoint, trainer)
    with metrics.aggregate("train"):
        while trainer.get_num_updates() < updates:
            itr = iterators.GroupedIterator(epoch_itr.next_epoch_itr(), update_freq)
            for samples in itr:
                trainer.train_step(samples)
                gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
                record["gradients"].append(gradients)
                if trainer.get_num_updates() == updates:
                    break
    with metrics.aggregate(new_root=True):
        for sample in trainer.get_valid_iterator("valid").next_epoch_itr(shuffle=False):
            trainer.valid_step(sample)
    record["parameters"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    record["expert names"] = [name for name, p in model.named_parameters() if hasattr(p, "expert")]
    return record


def train_all(data, cases):
    """Return the records of several trainings, by the names of their cases: name, arguments, update_freq."""
    return {name: train(data, arguments, update_freq=frequency) for name, arguments, frequency in cases}
