"""The trainings that train.py measures, with one interface: fairseq's with each router, and the plain loop."""

import argparse
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from plain import ADAM as ADAM_OPTIONS
from plain import PlainLoop, PlainModel
from rounds import reset_peak, resident
from torch import Tensor, nn

import fairseq_hash
from fairseq_hash.experiments.memory import KEPT
from fairseq_hash.experiments.sizes import BACKWARD
from fairseq_hash.moe.parameter_counts import count_parameters

ADAM = 8  # bytes of Adam's two moments per parameter, in fp32
ROUTERS = ("dense", "hash", "switch", "base")  # experiments of configs/laptop
PLAIN = ("plain", "compiled")
SENTENCE = 512  # tokens, if an update has that many
HEAD = 64  # width of an attention head, if the model is that wide
CONFIGS = Path(__file__).parents[1] / "configs"


class Training(Protocol):
    """One candidate.

    Attributes:
        parameters: number of all parameters.
        active: number of parameters that one token uses.
        planned_bytes: weights, gradients and Adam's state, as `fairseq-hash plan` counts them; None if it does not.
    """

    parameters: int
    active: int
    planned_bytes: "int | None"

    def update(self, batch: Any) -> float:
        """Return the seconds of one update."""

    def zero_grad(self) -> None:
        """Release the gradients."""

    def tensors(self) -> Iterable[Tensor]:
        """Return the tensors that it holds between updates, some more than once, without gradients."""


class FairseqTraining:
    """fairseq's own trainer."""

    def __init__(self, trainer: Any, precision: str) -> None:
        self.trainer = trainer
        self.parameters, self.active = count_parameters(trainer.get_model())
        weight, copies = KEPT.get(precision, (None, None))
        self.planned_bytes = None if weight is None else (2 * weight + copies + ADAM) * self.parameters

    def update(self, batch: Any) -> float:
        """Return the seconds of one update."""
        return update(self.trainer, batch)

    def zero_grad(self) -> None:
        """Release the gradients; with --bf16 fairseq keeps those in fp32."""
        self.trainer.zero_grad()

    def tensors(self) -> Iterable[Tensor]:
        """Return weights, buffers, optimizer state, and the fp32 copies of --bf16."""
        optimizer = self.trainer.optimizer
        copies = [copy for group in optimizer.param_groups for copy in group["params"]]
        return [
            *self.trainer.model.parameters(),
            *self.trainer.model.buffers(),
            *copies,
            *state_of(optimizer.optimizer),
        ]


class PlainTraining:
    """The plain loop."""

    def __init__(self, loop: PlainLoop) -> None:
        self.loop = loop
        self.parameters = self.active = sum(parameter.numel() for parameter in loop.model.parameters())
        self.planned_bytes = (2 * KEPT["fp32"][0] + ADAM) * self.parameters  # autocast keeps everything in fp32

    def update(self, batch: Any) -> float:
        """Return the seconds of one update."""
        return seconds_of(lambda: self.loop.train_step(batch))

    def zero_grad(self) -> None:
        """Release the gradients."""
        self.loop.optimizer.zero_grad()

    def tensors(self) -> Iterable[Tensor]:
        """Return weights, buffers and optimizer state."""
        return [*self.loop.model.parameters(), *self.loop.model.buffers(), *state_of(self.loop.optimizer)]


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors of an optimizer's state."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def make_training(
    arguments: argparse.Namespace, experts: int, data: Path, candidate: str, dense: "FairseqTraining | None"
) -> Training:
    """Return a candidate. A plain one starts from the weights of `dense`."""
    if candidate not in PLAIN:
        precision = ("memory-efficient " if arguments.memory_efficient_bf16 else "") + dtype_of(arguments)[1]
        return FairseqTraining(build(trainer_options(arguments, experts, data, candidate)), precision)
    return PlainTraining(plain_loop(dense.trainer, arguments, compiled=candidate == "compiled"))


def plain_loop(trainer: Any, arguments: argparse.Namespace, compiled: bool) -> PlainLoop:
    """Return the plain loop of a dense model's trainer. Its learning rate stays that of the first update."""
    model = PlainModel.like(trainer.get_model().decoder, min(SENTENCE, arguments.tokens))
    adam = {key: trainer.optimizer.param_groups[0][key] for key in ADAM_OPTIONS}
    return PlainLoop(model, adam, trainer.cfg.optimization.clip_norm, arguments.bf16, compiled)


def dtype_of(arguments: argparse.Namespace) -> tuple[torch.dtype, str]:
    """Return the dtype of products, and its name in `fairseq-hash plan`."""
    return (torch.bfloat16, "bf16") if arguments.bf16 else (torch.float32, "fp32")


def trainer_options(arguments: argparse.Namespace, experts: int, data: Path, candidate: str) -> list[str]:
    """Return the options for `fairseq-train`: those of an experiment of configs/laptop, at the measured size."""
    fairseq_hash.register()  # --user-dir does not where the package is imported before fairseq

    from fairseq_hash.experiments.compose import compose
    from fairseq_hash.experiments.flags import flags

    values = {
        "model.decoder_layers": arguments.layers,
        "model.decoder_embed_dim": arguments.width,
        "model.decoder_ffn_embed_dim": arguments.hidden,
        "model.decoder_attention_heads": max(1, arguments.width // HEAD),
        "model.num_experts": experts,
        "model.sparse_layers": f"'{arguments.sparse_layers}'",
        "task.tokens_per_sample": min(SENTENCE, arguments.tokens),
        "dataset.max_tokens": arguments.tokens,
        "dataset.required_batch_size_multiple": 1,
        "optimizer._name": arguments.optimizer,
        "criterion.log_expert_loads": False,
        "common.seed": arguments.seed,
        "common.cpu": arguments.device == "cpu",
        "common.bf16": arguments.bf16 and not arguments.memory_efficient_bf16,
        "common.memory_efficient_bf16": arguments.memory_efficient_bf16,
        "distributed_training.distributed_world_size": 1,
        "checkpoint.no_save": True,
    }
    config = compose(CONFIGS, f"laptop/{candidate}", [f"{name}={value}" for name, value in values.items()]).config
    # Paths may have characters that an override cannot.
    config.task.data = config.checkpoint.save_dir = str(data)
    config.common.user_dir = str(CONFIGS.parent / "fairseq_hash")
    return flags(config)


def build(words: Sequence[str]) -> Any:
    """Return the trainer for options of `fairseq-train`, as fairseq_cli/train.py makes it."""
    from fairseq import options, tasks, utils
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.trainer import Trainer

    arguments = options.parse_args_and_arch(options.get_training_parser(), list(words))
    configuration = convert_namespace_to_omegaconf(arguments)
    utils.set_torch_seed(configuration.common.seed)
    task = tasks.setup_task(configuration.task)
    model, criterion = task.build_model(configuration.model), task.build_criterion(configuration.criterion)
    trainer = Trainer(configuration, task, model, criterion)
    trainer.model, trainer.optimizer  # noqa: B018  (both are made when they are first asked for)
    return trainer


def update(trainer: Any, batch: Any) -> float:
    """Return the seconds of one update by fairseq's trainer."""
    from fairseq.logging import metrics

    metrics.reset()  # candidates have different numbers of experts
    with metrics.aggregate(new_root=True):
        # If memory is short, the trainer would skip the update and go on.
        return seconds_of(lambda: trainer.train_step([batch], raise_oom=True))


def batches_of(trainer: Any, count: int) -> list[Any]:
    """Return a number of full batches of the training data; if there are fewer, they repeat from the first."""
    # All sentences except the last have the same length, so at most one batch is smaller than the others.
    batches = list(itertools.islice(trainer.get_train_iterator(1).next_epoch_itr(), count + 1))
    most = max(batch["ntokens"] for batch in batches)
    full = [batch for batch in batches if batch["ntokens"] == most]
    return [full[number % len(full)] for number in range(count)]


def flops_of_token(model: nn.Module, layers: int, context: int) -> int:
    """Return the FLOPs of training a dense model on one token, counted as `fairseq_hash.experiments.sizes` does.

    The output is a product with the embedding, which counts once, because looking up a token is not a product.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    attention = 4 * matrices[0].shape[1] * context * layers
    return (1 + BACKWARD) * (2 * sum(matrix.numel() for matrix in matrices) + attention)


def seconds_of(call: Callable[[], Any]) -> float:
    """Return the seconds of a call, including its work on the device."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else contextlib.nullcontext
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def held_bytes(training: Training) -> int:
    """Return the bytes that a training holds now: its tensors and their gradients."""
    own = list(training.tensors())
    own += [tensor.grad for tensor in own if tensor.grad is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in own}.values())


def peak_bytes(training: Training, all_trainings: Iterable[Training], batch: Any, on_cuda: bool) -> "int | None":
    """Return the peak bytes of a training in an update: its own, and those that the update adds; None if unknown."""
    for one in all_trainings:
        one.zero_grad()
    held = held_bytes(training)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with mock.patch("torch.cuda.reset_peak_memory_stats"):  # fairseq's trainer does it at the end of an update
            training.update(batch)
        return held + torch.cuda.max_memory_allocated() - before
    if not reset_peak():
        return None
    before = resident("VmRSS")
    training.update(batch)
    return held + resident("VmHWM") - before
