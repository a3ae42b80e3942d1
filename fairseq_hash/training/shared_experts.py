"""What fairseq's trainer needs while ranks share experts. `fairseq_patches` puts it in place."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fairseq.optim import FairseqOptimizer
from torch import Tensor, nn

from fairseq_hash.checkpoint.expert_state import optimized
from fairseq_hash.core.errors import UserError
from fairseq_hash.core.validators import refuse
from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.token_dispatcher import LocalDispatcher
from fairseq_hash.parallel.collectives import gather
from fairseq_hash.parallel.gradients import norm_of_shards, norm_with_experts
from fairseq_hash.parallel.groups import ExpertParallel
from fairseq_hash.parallel.watchdog import Watchdog, ended_by_errors, watchdog_of
from fairseq_hash.training.not_finite import blame, experts_not_finite

MOST_RANKS = 4096  # of those that are named where a batch cannot be shared
BACKENDS = ("legacy_ddp", "no_c10d", "pytorch_ddp", "c10d", "fully_sharded")


def check_device(is_sharded: bool, on_cpu: bool) -> None:
    """Raise `UserError` where fully sharded data parallel has no CUDA, or is not to use it."""
    if is_sharded and (on_cpu or not torch.cuda.is_available()):
        raise UserError("--ddp-backend fully_sharded needs CUDA; use legacy_ddp or pytorch_ddp on a CPU")


def check_training(cfg: Any, dispatcher: type[LocalDispatcher], has_replicas: bool = False) -> None:
    """Raise `UserError` if an option of the training does not go with shared experts, their dispatcher or replicas."""
    training, common = cfg.distributed_training, cfg.common
    backend = training.ddp_backend
    instead = "; or leave every rank all experts: --expert-parallel-size 1"
    flattens = not (common.memory_efficient_fp16 or common.fp16_no_flatten_grads or backend == "fully_sharded")
    form = "fp16" if common.fp16 else "bf16"
    refusals = {
        f"--ddp-backend {backend} does not go with shared experts; use legacy_ddp, pytorch_ddp or fully_sharded": (
            backend not in BACKENDS
        ),
        "--ddp-backend fully_sharded with shared experts saves what each rank holds in a file of its own; add "
        f"--use-sharded-state{instead}": backend == "fully_sharded" and not training.use_sharded_state,
        "--ddp-backend fully_sharded saves what each rank holds, and with --expert-replicas that is not each expert "
        "once; use legacy_ddp or pytorch_ddp": backend == "fully_sharded" and has_replicas,
        "--fp16 flattens all gradients into one, experts and others; add --fp16-no-flatten-grads, or use "
        f"--memory-efficient-fp16{instead}": common.fp16 and flattens,
        f"--{form} does not go with --expert-dispatch fairscale, whose masks are fp32; use all-to-all": (
            dispatcher.is_fp32_only and (common.fp16 or common.bf16)
        ),
        "--amp keeps a loss scale on every rank, and with shared experts they drift apart; use --bf16"
        f"{instead}": common.amp,
        f"--zero-sharding {training.zero_sharding} gives experts to ranks that do not hold them; leave it out"
        f"{instead}": training.zero_sharding != "none",
        f"--store-ema does not go with shared experts: a rank has its own alone; leave it out{instead}": (
            cfg.ema.store_ema
        ),
    }
    others = {
        "--use-bmuf": cfg.optimization.use_bmuf,
        "--model-parallel-size": common.model_parallel_size > 1,
        "--pipeline-model-parallel": training.pipeline_model_parallel,
        "--tpu": common.tpu,
    }
    refusals |= {f"{name} does not go with shared experts; leave it out": is_set for name, is_set in others.items()}
    refuse(refusals)


def scaled_update_freq(update_freq: Sequence[int], meant_for: int, ranks: int) -> list[int]:
    """Return how many batches each of `ranks` ranks accumulates, where `update_freq` is meant for `meant_for` ranks.

    Raises:
        UserError: where that is no whole number.
    """
    for freq in update_freq:
        if freq * meant_for % ranks:
            batches = [freq * meant_for for freq in update_freq]
            common = math.gcd(*batches)
            fitting = [count for count in range(1, min(common, MOST_RANKS) + 1) if common % count == 0]
            raise UserError(
                f"an update is of {freq * meant_for} batches (--update-freq {freq} on --update-freq-ranks {meant_for} "
                f"ranks), which {ranks} ranks cannot share; use {', '.join(map(str, fitting))} ranks, or another "
                "--max-tokens and --update-freq"
            )
    return [freq * meant_for // ranks for freq in update_freq]


class SharedTraining:
    """The gradient norm, the optimizer's state and the failures of a training whose ranks share experts."""

    def __init__(self, model: nn.Module, parallel: ExpertParallel, watchdog: Watchdog) -> None:
        self.model = model
        self.parallel = parallel
        self.watchdog = watchdog
        self.finite: Tensor | None = None

    @classmethod
    def of(cls, cfg: Any, model: nn.Module) -> "SharedTraining | None":
        """Return what the trainer of `model` needs; None where every rank holds all experts.

        Raises:
            UserError: where an option does not go with shared experts.
        """
        check_device(cfg.distributed_training.ddp_backend == "fully_sharded", cfg.common.cpu)
        layers = (module for module in model.modules() if isinstance(module, SparseLayer))
        layer = next(layers, None)
        if layer is None or not layer.parallel.is_shared:
            return None
        check_training(cfg, type(layer.dispatcher), layer.parallel.num_replicas > 0)
        parallel = layer.parallel
        return cls(model, parallel, watchdog_of(parallel.rank, parallel.world_size))

    def watch_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a task's step, made to end the job on any error and to remember whether its losses were finite."""

        def call(*args: Any, **kwargs: Any) -> Any:
            loss, *rest = step(*args, **kwargs)
            finite = loss.detach().isfinite()
            self.finite = finite if self.finite is None else self.finite & finite
            return loss, *rest

        return functools.partial(ended_by_errors, call)

    @contextmanager
    def an_update(self) -> Iterator[None]:
        """End the job where an update fails.

        The gradient norm is the same on every rank: where it is not finite all of them arrive here.
        """
        self.finite = None
        try:
            yield
        except FloatingPointError as error:
            finite = gather(self.finite is None or bool(self.finite))
            ranks = [str(rank) for rank, is_finite in enumerate(finite) if not is_finite]
            cause = blame([what for found in gather(experts_not_finite(self.model, not ranks)) for what in found])
            if self.parallel.rank > 0:
                self.watchdog.leave()
            if not ranks:
                advice = "lower the learning rate or clip gradients"
                self.watchdog.end(f"every rank: {error}, with finite losses; {advice}{cause}")
            self.watchdog.end(f"rank {', '.join(ranks)}: the loss is NaN or infinite{cause}")
        except Exception as error:
            self.watchdog.fail(error)

    def norm(self, optimizer: torch.optim.Optimizer, dense_is_sharded: bool, dense_norm: Tensor) -> Tensor:
        """Return the norm of all gradients, from that of the dense ones, of which each rank may hold a part."""
        if dense_is_sharded:
            dense_norm = norm_of_shards(dense_norm)
        gradients = [p.grad for p in optimized(optimizer) if hasattr(p, "expert") and p.grad is not None]
        return norm_with_experts(dense_norm, gradients, self.parallel)

    @staticmethod
    def check_optimizer(optimizer: FairseqOptimizer) -> None:
        """Raise `UserError` for an optimizer that does not say that it treats each element on its own."""
        if not optimizer.supports_flat_params:
            raise UserError(
                f"the optimizer {type(optimizer).__name__} may look at whole parameters, which differ with the number "
                "of ranks that share experts; use adam or sgd, or --expert-parallel-size 1"
            )
