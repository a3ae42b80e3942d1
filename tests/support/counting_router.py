"""A router that keeps state, and trainings with it and with `outside_router`; `ranks` runs these functions."""

import recorded
import torch
from outside_router import RandomTop2

from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.routers import register_router


@register_router("counting")
class Counting(RandomTop2):
    """Remembers how many tokens chose each expert, by update, in a buffer."""

    @classmethod
    def build(cls, settings):
        self = super().build(settings)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("chosen_UE", torch.zeros(20, settings.num_experts, dtype=torch.float64))
        return self

    def after_update(self, tokens_per_expert_E):
        self.chosen_UE[self.updates] = tokens_per_expert_E
        self.updates += 1


def train(data, arguments):
    """Return the record of a training of 20 updates."""
    return recorded.train(data, arguments)


def count(data, arguments, updates):
    """Return what the routers of a training counted, and what went through them, both by update and expert."""
    trainer, epoch_itr = recorded.make_trainer(data, arguments)
    layers = [module for module in trainer.get_model().modules() if isinstance(module, SparseLayer)]
    seen = [torch.zeros(updates, layer.parallel.num_experts, dtype=torch.float64) for layer in layers]
    for layer, seen_UE in zip(layers, seen, strict=True):
        layer.router.register_forward_hook(_add_to(seen_UE, trainer))
    prepare = trainer._prepare_sample

    def prepare_sample(sample, is_dummy=False):
        trainer.is_dummy_now = is_dummy
        return prepare(sample, is_dummy)

    trainer._prepare_sample = prepare_sample
    recorded.run(trainer, epoch_itr, updates)
    recorded.validate(trainer)  # which is no update
    return [layer.router.chosen_UE[:updates] for layer in layers], seen


def _add_to(seen_UE, trainer):
    def keep(router, inputs, assignment):
        if router.training and not trainer.is_dummy_now:
            chosen_E = torch.bincount(assignment.expert_TK.flatten(), minlength=seen_UE.shape[1])
            seen_UE[trainer.get_num_updates()] += chosen_E

    return keep
