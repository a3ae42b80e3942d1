"""One update of one rank, run dry: what it holds, what it sends, and how long it may take."""

import logging
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from fairseq_hash.core.errors import UserError
from fairseq_hash.dry_run.collectives import Collective, CollectiveCounter
from fairseq_hash.dry_run.hardware import Hardware
from fairseq_hash.dry_run.known_rows import RowsOf, even_rows
from fairseq_hash.dry_run.memory import OPTIMIZER, MemoryWatch
from fairseq_hash.dry_run.roofline import Roofline
from fairseq_hash.dry_run.world import check_dispatch, without_data, world
from fairseq_hash.experiments.compose import Experiment
from fairseq_hash.experiments.memory import place_of
from fairseq_hash.experiments.sizes import made_task, vocabulary_of, without_files
from fairseq_hash.fairseq_patches.registry import replaced
from fairseq_hash.moe.kernels.feed_forward import GPU_WAYS
from fairseq_hash.parallel.groups import ExpertParallel
from fairseq_hash.parallel.placement import CONTIGUOUS


@dataclass(frozen=True)
class DryRun:
    """What one update of one rank was, after a first update that made the optimizer's state.

    Attributes:
        place: this rank's place among those that share the experts.
        peak: bytes by kind (`memory.KINDS`) when their sum was largest.
        rest: bytes by kind between two updates.
        calls: the collectives.
        flops: of this rank's matrix products.
        seconds: by what limits an operation (`roofline`), collectives left out.
        tokens: of this rank.
        parameters: that this rank holds.
    """

    place: ExpertParallel
    peak: dict[str, int]
    rest: dict[str, int]
    calls: list[Collective]
    flops: int
    seconds: dict[str, float]
    tokens: int
    parameters: int

    def wire(self, ranks_per_node: int) -> tuple[float, float]:
        """Return the bytes that this rank sends inside of its node, and to other nodes."""
        inside, between = (
            zip(*(call.over_wire(ranks_per_node) for call in self.calls), strict=True) if self.calls else ((), ())
        )
        return sum(inside), sum(between)

    def wire_seconds(self, on: Hardware) -> float:
        """Return the time of the collectives: latency, and the bytes at the rate of their wire, one after the other."""
        inside, between = self.wire(on.devices_per_node)
        return len(self.calls) * on.latency * 1e-6 + inside / (on.wire_inside * 1e9) + between / (on.wire_between * 1e9)


@dataclass(frozen=True)
class Batches:
    """What a rank trains on in one update: as many batches as it accumulates, all alike.

    Attributes:
        number: of batches.
        sentences: B of each.
        length: L, tokens of a sentence; none is padding.
    """

    number: int
    sentences: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of one update."""
        return self.number * self.sentences * self.length

    def made(self) -> list[dict[str, Any]]:
        """Return the batches, as fairseq's language-modeling task collates them; their token ids are 0."""
        shape = self.sentences, self.length
        net_input = {
            "src_tokens": torch.zeros(shape, dtype=torch.int64),
            "src_lengths": torch.full(shape[:1], self.length),
        }
        sample = {
            "id": torch.arange(self.sentences),
            "nsentences": self.sentences,
            "ntokens": self.sentences * self.length,
            "net_input": net_input,
            "target": torch.zeros(shape, dtype=torch.int64),
        }
        return [sample] * self.number


def dry_run(
    experiment: Experiment,
    ranks: int,
    rank: int,
    on: Hardware,
    rows: RowsOf = even_rows,
    lookups: RowsOf = even_rows,
) -> DryRun:
    """Run the second update of a training of `ranks` ranks as its `rank`, without data.

    Args:
        experiment: the configuration; its data, tables and other files need not be there.
        ranks: W.
        rank: from 0 to W - 1.
        on: the device. A GPU multiplies by experts as this package does on one.
        rows: how many rows each rank of a group has for each expert, where nothing else is known evenly many.
        lookups: how many rows of a memory each rank of a group asks each rank for.

    Raises:
        UserError: for options that the training or a dry run refuses, or a number of ranks that cannot share experts.
    """
    if not 0 <= rank < ranks:
        raise UserError(f"rank {rank} is not one of {ranks} ranks; give one from 0 to {ranks - 1}")
    config, vocabulary = _config(experiment, ranks, rank), vocabulary_of(experiment)
    place = replace(place_of(config, ranks), rank=rank)
    with world(ranks, rank, rows, lookups, GPU_WAYS if on.is_gpu else None), silence():
        task = made_task(config, vocabulary)
        with torch.device("meta"):
            model, criterion = task.build_model(config.model), task.build_criterion(config.criterion)
        memory, counter, roofline = MemoryWatch(), CollectiveCounter(), Roofline(on)
        with ExitStack() as stack:
            # What is logged is of this run alone: fairseq adds up what has a name as long as the process lives.
            stack.enter_context(replaced(metrics, "_aggregators", OrderedDict()))
            stack.enter_context(metrics.aggregate(new_root=True))
            stack.enter_context(without_data())
            stack.enter_context(memory)
            model.to_empty(device="cpu")
            trainer = Trainer(config, task, model, criterion)
            # A trainer saves what it has where an update fails; here there is nothing to save.
            stack.enter_context(replaced(trainer, "save_checkpoint", lambda *args: None))
            # A measurement reads values, which are not there, and has a file, which a training may be writing.
            trainer.hash_state.monitor = None
            memory.mark_model(trainer._model)
            batches = batches_of(config).made()
            stack.enter_context(_known_shapes(config.model.router))
            trainer.train_step(batches)
            memory.mark(_optimizer_state(trainer), OPTIMIZER)
            memory.begin()
            rest = dict(memory.now)
            with counter, roofline:
                trainer.train_step(batches)
    return DryRun(
        place,
        memory.peak,
        rest,
        counter.calls,
        roofline.flops,
        roofline.seconds,
        batches_of(config).tokens,
        sum(parameter.numel() for parameter in model.parameters()),
    )


@contextmanager
def _known_shapes(router: str) -> Iterator[None]:
    """Refuse a model in which shapes depend on values, such as one whose experts choose their tokens."""
    try:
        yield
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        raise UserError(
            f"a dry run cannot follow --router {router}: in it shapes depend on the tokens' values ({error.func}); "
            "take another router for the estimate"
        ) from error


@contextmanager
def silence() -> Iterator[None]:
    """Log nothing: what is logged is of trainings, and this is none."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _config(experiment: Experiment, ranks: int, rank: int) -> DictConfig:
    """Return the configuration as a rank has it, on tensors that lie on a CPU.

    Raises:
        UserError: if a dry run does not know a backend or dispatcher.
    """
    if replicas := experiment.config.model.get("expert_replicas", 0):
        raise UserError(f"a dry run does not know --expert-replicas {replicas}; leave it out")
    if (placement := experiment.config.model.get("expert_placement", CONTIGUOUS)) != CONTIGUOUS:
        raise UserError(
            f"a dry run gives all experts as many rows, so that --expert-placement {placement} changes nothing; leave "
            "it out, or give loads by --load-file"
        )
    config = without_files(OmegaConf.create(OmegaConf.to_container(experiment.config)))
    training = config.distributed_training
    if training.ddp_backend not in ("legacy_ddp", "no_c10d"):
        raise UserError(f"a dry run knows --ddp-backend legacy_ddp, not {training.ddp_backend}")
    if place_of(config, ranks).is_shared:
        check_dispatch(config.model.expert_dispatch)
    training.distributed_world_size, training.distributed_rank = ranks, rank
    config.common.cpu = True
    return config


def batches_of(config: DictConfig) -> Batches:
    """Return the batches of an update; `Trainer` has scaled their number to the ranks by now."""
    length, dataset = config.task.tokens_per_sample, config.dataset
    most = [dataset.max_tokens // length] if dataset.max_tokens else []
    most += [dataset.batch_size] if dataset.batch_size else []
    return Batches(config.optimization.update_freq[0], max(1, min(most, default=1)), length)


def _optimizer_state(trainer: Trainer) -> Iterator["Tensor | None"]:
    """Yield the tensors of the optimizer: its state, and copies of weights and gradients in fp32."""
    own = {id(parameter) for parameter in trainer._model.parameters()}
    optimizer = trainer.optimizer.optimizer
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in own:
                yield from (parameter, parameter.grad)
            yield from (value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor))
