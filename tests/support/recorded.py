"""Train with fairseq's own trainer in this process, and keep every number: what the tests of exactness compare."""

import contextlib
import io

import ranks
import torch
from fairseq import checkpoint_utils, utils
from fairseq.data import iterators
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from plugin import build

from fairseq_hash.moe.layer import SparseLayer

UPDATES = 8
"""More than an epoch of any number of ranks (7 updates of two), at whose end some rank has no batch."""


def train(data, arguments, updates=UPDATES):
    """Return losses, gradient norms, gradients and final parameters of a training, by update.

    `loss` and `validation` are sums over the tokens of all ranks. `gradients` are those that the optimizer got, clipped
    and scaled.
    """
    trainer, epoch_itr = make_trainer(data, arguments)
    model = trainer.get_model()
    record = {**keep_losses_and_norms(trainer), "gradients": [], "dummies": 0}
    clip_grad_norm, prepare_sample = trainer.clip_grad_norm, trainer._prepare_sample

    def keep_gradients(clip_norm):
        norm = clip_grad_norm(clip_norm)
        record["gradients"].append({name: p.grad.cpu().clone() for name, p in model.named_parameters()})
        return norm

    def count_dummies(sample, is_dummy=False):
        record["dummies"] += is_dummy
        return prepare_sample(sample, is_dummy)

    trainer.clip_grad_norm, trainer._prepare_sample = keep_gradients, count_dummies
    run(trainer, epoch_itr, updates)
    validate(trainer)
    record["parameters"] = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    return record | held_by(model)


def held_by(model):
    """Return the number of ranks that share one set of experts, and those of this rank."""
    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
    if not layers:
        return {"size": 1, "experts": [0]}
    return {"size": layers[0].parallel.size, "experts": list(layers[0].parallel.expert_ids)}


def keep_losses_and_norms(trainer):
    """Return lists that the trainer fills."""
    record = {"loss": [], "norm": [], "validation": []}
    clip_grad_norm, reduce_metrics = trainer.clip_grad_norm, trainer.task.reduce_metrics

    def keep_loss(logging_outputs, criterion):
        record["loss" if criterion.training else "validation"].append(
            sum(float(log["loss"]) for log in logging_outputs)
        )
        return reduce_metrics(logging_outputs, criterion)

    def keep_norm(clip_norm):
        norm = clip_grad_norm(clip_norm)
        record["norm"].append(float(norm))
        return norm

    trainer.clip_grad_norm, trainer.task.reduce_metrics = keep_norm, keep_loss
    return record


def make_trainer(data, arguments):
    """Return fairseq's trainer and its iterator over epochs, as `fairseq-train` makes them."""
    is_one_of_many = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if is_one_of_many else 0
    world_size = torch.distributed.get_world_size() if is_one_of_many else 1
    shared = ("--distributed-world-size", world_size, "--distributed-rank", rank, "--ddp-backend", "legacy_ddp")
    fixed = ("--optimizer", "adam", "--lr", "1e-3", "--seed", "5", "--num-workers", "0")
    keeps = () if "--save-dir" in arguments else ("--no-save",)
    utils.set_torch_seed(5)
    metrics.reset()
    with contextlib.redirect_stderr(io.StringIO()):
        # One process is compared with several on GPUs: on a GPU as well.
        on_cpu = ranks.device().type == "cpu" if is_one_of_many else torch.cuda.device_count() < 2
        cfg, task, model, criterion = build(data, *shared, *fixed, *keeps, *arguments, on_cpu=on_cpu)
    task.load_dataset(cfg.dataset.valid_subset)
    trainer = Trainer(cfg, task, model, criterion)
    _, epoch_itr = checkpoint_utils.load_checkpoint(cfg.checkpoint, trainer)
    return trainer, epoch_itr


def run(trainer, epoch_itr, updates):
    """Train to a number of updates."""
    with metrics.aggregate("train"):
        while trainer.get_num_updates() < updates:
            update_freq = trainer.cfg.optimization.update_freq[0]
            for samples in iterators.GroupedIterator(epoch_itr.next_epoch_itr(), update_freq):
                trainer.train_step(samples)
                if trainer.get_num_updates() == updates:
                    break


def validate(trainer):
    """Go through the validation set."""
    subset = trainer.cfg.dataset.valid_subset
    with metrics.aggregate(new_root=True):
        for sample in trainer.get_valid_iterator(subset).next_epoch_itr(shuffle=False):
            trainer.valid_step(sample)


def train_all(data, cases):
    """Return the records of several trainings, `cases` being their arguments by name."""
    return {name: train(data, arguments) for name, arguments in cases.items()}
