"""Real trainings to compare dry runs with: every rank of a process group does two updates; `ranks` runs it."""

import gc
import itertools
import logging

import torch
import torch.distributed as dist
from fairseq.logging import metrics
from fairseq.trainer import Trainer

import fairseq_hash
from fairseq_hash.dry_run.collectives import CollectiveCounter
from fairseq_hash.dry_run.memory import MemoryWatch
from fairseq_hash.experiments.compose import compose
from fairseq_hash.experiments.names import own_configs
from fairseq_hash.moe.all_to_all import AllToAllDispatcher
from fairseq_hash.moe.kernels import huge_pages
from fairseq_hash.moe.token_dispatcher import LocalDispatcher

SECOND = "the second update"
ORIGINAL = {}  # what plans begin with, by dispatcher


def experiment_of(name, overrides):
    fairseq_hash.register()
    return compose(own_configs(), name, overrides)


def measure_all(cases):
    """Return what `measure` returns, of each case."""
    logging.disable()
    huge_pages.ADVICE = None  # its memory is the system's, which no profiler sees
    return [measure(name, overrides) for name, overrides in cases]


def measure(name, overrides):
    """Return what a rank saw: choices for each expert by plan, bytes by collective and peak memory in update 2."""
    from fairseq_hash.dry_run.update import batches_of
    from fairseq_hash.experiments.sizes import made_task

    # Of the case before: its memory would otherwise go in the middle of this one, and its meters would count on.
    gc.collect()
    metrics.reset()
    experiment = experiment_of(name, overrides)
    config, vocabulary = experiment.config, experiment.about["vocabulary"]
    config.common.cpu = True
    config.distributed_training.distributed_world_size = dist.get_world_size()
    config.distributed_training.distributed_rank = dist.get_rank()
    torch.manual_seed(1)
    # From the start on: of memory that was taken before, the profiler does not see that it is given back.
    with torch.profiler.profile(profile_memory=True) as profiler, MemoryWatch() as watch:
        task = made_task(config, vocabulary)
        model, criterion = task.build_model(config.model), task.build_criterion(config.criterion)
        trainer = Trainer(config, task, model, criterion)
        torch.manual_seed(dist.get_rank())
        samples = batches_of(config).made()
        for sample in samples:
            for tokens in (sample["net_input"]["src_tokens"], sample["target"]):
                tokens.copy_((torch.rand(tokens.shape).square() * vocabulary).long() + 4)  # uneven
        chosen = record_choices()
        trainer.train_step(samples)
        watch.begin()
        with CollectiveCounter() as counter, torch.profiler.record_function(SECOND):
            trainer.train_step(samples)
    counts = [chosen_E.tolist() for chosen_E in chosen]
    watched = sum(watch.peak.values())
    return {"chosen": counts, "bytes": dict(counter.bytes), "peak": peak_of(profiler), "watched": watched}


def record_choices():
    """Return a list that gets, for each plan that begins, how many choices this rank has for each expert."""
    chosen = []
    for kind in (LocalDispatcher, AllToAllDispatcher):
        original = ORIGINAL.setdefault(kind, kind.begin)

        def begin(self, expert_TK, capacity_factor=0.0, order_C=None, original=original):
            chosen.append(torch.bincount(expert_TK.flatten(), minlength=self.parallel.num_experts))
            return original(self, expert_TK, capacity_factor, order_C)

        kind.begin = begin
    return chosen


def peak_of(profiler):
    """Return the most bytes that the allocator had given out at one time in the second update."""
    events = profiler.profiler.kineto_results.events()
    (start,) = [event.start_ns() for event in events if event.name() == SECOND]
    memory = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    total = itertools.accumulate(event.nbytes() for event in memory)
    return max(size for event, size in zip(memory, total, strict=True) if event.start_ns() >= start)
