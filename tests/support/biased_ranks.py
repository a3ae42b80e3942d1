"""Trainings with top-k routers whose biases are kept; `ranks` runs these functions."""

import recorded
import torch

from fairseq_hash.moe.layer import SparseLayer


def biases(trainer):
    """Return the bias of each sparse layer of a trainer's model."""
    layers = [module for module in trainer.get_model().modules() if isinstance(module, SparseLayer)]
    return [layer.router.bias_E.clone() for layer in layers]


def train(data, arguments, updates):
    """Return the biases after each update, what each update gave to the routers, and the biases after a validation."""
    trainer, epoch_itr = recorded.make_trainer(data, arguments)
    layers = [module for module in trainer.get_model().modules() if isinstance(module, SparseLayer)]
    made = {"biases": [], "given": [[] for _ in layers]}
    for layer, given in zip(layers, made["given"], strict=True):
        layer.router.after_update = _keep(layer.router.after_update, given)
    for update in range(1, updates + 1):
        recorded.run(trainer, epoch_itr, update)
        made["biases"].append(torch.stack(biases(trainer)))
    recorded.validate(trainer)
    made["after validation"] = torch.stack(biases(trainer))
    return made


def _keep(after_update, given):
    def call(tokens_per_expert_E, *update_sums_N):
        given.append((tokens_per_expert_E.clone(), *(sums_N.clone() for sums_N in update_sums_N)))
        return after_update(tokens_per_expert_E, *update_sums_N)

    return call
