"""Several ranks."""

import atexit
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from fairseq.distributed import LegacyDistributedDataParallel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fairseq_hash.fairseq_patches.registry import override, replacement


@override("fairseq.distributed.utils", "distributed_init")
def _finish_later(original: Callable[..., int], cfg: Any) -> int:
    """Let Python end only when gloo has finished, as `let_gloo_finish` says."""
    rank = original(cfg)
    atexit.unregister(let_gloo_finish)  # of a training before this one
    atexit.register(let_gloo_finish)
    return rank


def let_gloo_finish() -> None:
    """Wait a moment before Python ends, where ranks talk over gloo.

    Upstream: a thread of torch's gloo backend frees the tensors of the last exchange soon after it. Where Python is
    about to end by then, the thread aborts the process ("terminate called without an active exception"): a finished
    training would look like a failed one. Seen in 4 of 45 processes that ended right after a barrier (torch 2.13).
    """
    if dist.is_initialized() and "gloo" in dist.get_backend():
        time.sleep(0.2)


@override("fairseq.distributed.utils", "_broadcast_object_slow")
def _broadcast_any_object(
    original: Callable[..., Any], value: Any, src_rank: int, group: Any, dist_device: torch.device
) -> Any:
    """Let several ranks resume from a checkpoint.

    Upstream: rank 0 reads the file and sends what it made of it, configuration objects included, to the others. They
    read it with `torch.load`, which since torch 2.6 takes tensors and plain values only: right for files, but this is
    another process of the same job.
    """
    values = [value]
    dist.broadcast_object_list(values, src_rank, group, dist_device)
    return values[0]


@override("fairseq.utils", "clip_grad_norm_")
def _clip_experts_alone(
    original: Callable[..., Tensor], params: "Tensor | Iterable[nn.Parameter]", *args: Any, **kwargs: Any
) -> Tensor:
    """Clip where nothing but shared experts is trained (`--freeze all-but-experts`).

    Upstream: without a gradient of a parameter that is no expert's, the norm is 0, and nothing is scaled.
    """
    params = [params] if isinstance(params, Tensor) else list(params)
    if params and all(hasattr(parameter, "expert") for parameter in params):
        no_expert = nn.Parameter(torch.zeros_like(params[0][:1]))
        no_expert.grad = torch.zeros_like(no_expert)
        params.append(no_expert)
    return original(params, *args, **kwargs)


@override("fairseq.distributed.LegacyDistributedDataParallel", "all_reduce_grads")
def _reduce_experts_under_legacy_ddp(original: Callable[..., None], wrapper: LegacyDistributedDataParallel) -> None:
    """Reduce the experts' gradients after the dense ones.

    Upstream: `FairseqOptimizer.all_reduce_grads` calls a method of that name where the module has one. The wrappers of
    the other backends have none and pass the call on to the model; this one skips experts and does not.
    """
    original(wrapper)
    if hasattr(wrapper.module, "all_reduce_grads") and not wrapper.accumulate_grads:
        wrapper.module.all_reduce_grads()


class _NothingToReduce(nn.Module):
    """What stands for a wrapper that would reduce nothing."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@replacement("fairseq.models.distributed_fairseq_model", "DistributedDataParallel")
def _on_any_device(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Make torch's DistributedDataParallel work on a CPU, and if nothing but shared experts is trained.

    Upstream: fairseq/models/distributed_fairseq_model.py always passes device ids, which torch refuses for a model on
    the CPU; torch also refuses a model without a parameter to reduce.
    """
    return data_parallel


def data_parallel(module: nn.Module, device_ids: Any, output_device: Any, **kwargs: Any) -> nn.Module:
    """Return the module as torch wraps it, on its own device; in a plain wrapper if there is nothing to reduce."""
    ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
    if not any(p.requires_grad for name, p in module.named_parameters() if name not in ignored):
        return _NothingToReduce(module)
    if next(module.parameters()).device.type == "cpu":
        device_ids = output_device = None
    return DistributedDataParallel(module, device_ids, output_device, **kwargs)
