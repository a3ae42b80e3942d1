"""The world of a dry run: as many ranks as one likes, tensors without data, and one made number for whatever is read.

This is the one place where a dry run replaces what a training has. Each replacement says why.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.onnx.operators
from fairseq.distributed.utils import get_global_group
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from fairseq_hash.core.errors import UserError
from fairseq_hash.dry_run.known_rows import KnownDispatcher, RowsOf, even_rows, known_balance
from fairseq_hash.fairseq_patches.registry import replaced
from fairseq_hash.lm import model as lm_model
from fairseq_hash.moe import memory_rows
from fairseq_hash.moe.dispatchers import DISPATCHERS
from fairseq_hash.moe.kernels import feed_forward
from fairseq_hash.moe.routers import base
from fairseq_hash.parallel import collectives
from fairseq_hash.training import shared_experts


class MadeNumbers(TorchDispatchMode):
    """What the host reads of a tensor is 1; of `all` it is true, of `any` false.

    So a loss and a norm are finite, and no token of a batch is padding.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer a read; let all else pass."""
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            if dtype is torch.bool:
                return not getattr(args[0], "is_of_any", False)
            return 1.0 if dtype.is_floating_point else 1
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.any:
            result.is_of_any = True
        return result


class _NoWatchdog:
    """What stands for the watchdog: there is no other rank that could wait."""

    @staticmethod
    def fail(error: BaseException) -> NoReturn:
        raise error


@contextlib.contextmanager
def world(
    ranks: int,
    rank: int,
    rows: RowsOf = even_rows,
    lookups: RowsOf = even_rows,
    ways: "dict[torch.dtype, str] | None" = None,
) -> Iterator[None]:
    """Be `rank` of `ranks`, of which no other exists; what is built and called inside believes in them.

    Args:
        ranks: W.
        rank: from 0 to W - 1.
        rows: how many rows each rank of a group has for each expert, plan by plan.
        lookups: how many rows of a memory each rank of a group asks each rank for, plan by plan.
        ways: how a GPU multiplies rows by experts, by dtype (`feed_forward.GPU_WAYS`); None: as this CPU does.

    Raises:
        UserError: if this process is in a process group.
    """
    if dist.is_initialized():
        raise UserError("a dry run needs a process of its own: this one is in a process group")
    replacements = [
        # Ranks that do not exist have nothing to say.
        (collectives, "gather", lambda value: [value]),
        (lm_model, "watchdog_of", lambda rank, ranks: _NoWatchdog()),
        (shared_experts, "watchdog_of", lambda rank, ranks: _NoWatchdog()),
        # How many rows go where is known beforehand: the tokens that would tell have no values.
        (lm_model, "make_dispatcher", lambda parallel, name: KnownDispatcher(parallel, rows)),
        (memory_rows, "make_dispatcher", lambda parallel: KnownDispatcher(parallel, lookups)),
        (base, "balance_over", known_balance),
        # fairseq's sinusoidal positions ask for a shape as a tensor, and read it.
        (torch.onnx.operators, "shape_as_tensor", lambda tensor: list(tensor.shape)),
        # A module's conversion swaps its parameters, which tensors without data refuse.
        (nn.Module, "_apply", _conversion()),
    ]
    if ways is not None:
        replacements.append((feed_forward, "choose_way", lambda rows, weights: ways.get(rows.dtype, "loop")))
    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        stack.callback(dist.destroy_process_group)
        # fairseq keeps its group of all ranks for good.
        stack.callback(get_global_group.__dict__.pop, "_global_group", None)
        # Experts on several threads would leave the modes behind, which hold for one thread.
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1)
        for owner, name, value in replacements:
            stack.enter_context(replaced(owner, name, value))
        yield


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Give tensors no data: shapes, dtypes and storages only. Tensors on `meta` may come in."""
    with FakeTensorMode(allow_non_fake_inputs=True), MadeNumbers():
        yield


def _conversion() -> Callable[..., nn.Module]:
    """Return what does as `nn.Module._apply`, with new parameters where dtype or device change.

    Attributes stay, and modules that share a parameter share the new one.
    """
    made = WeakIdKeyDictionary()  # of the parameter that it takes the place of

    def convert(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if recurse:
            for child in module.children():
                child._apply(change)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            with torch.no_grad():
                changed = change(parameter)
            if (changed.dtype, changed.device) == (parameter.dtype, parameter.device):
                continue
            if parameter not in made:
                made[parameter] = nn.Parameter(changed.detach(), parameter.requires_grad)
                made[parameter].__dict__.update(parameter.__dict__)
            module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = change(buffer)
        return module

    return convert


def check_dispatch(name: str) -> None:
    """Raise `UserError` for a token dispatcher whose rows a dry run does not know."""
    if name != "all-to-all":
        raise UserError(f"a dry run knows --expert-dispatch all-to-all, not {', '.join(set(DISPATCHERS) & {name})}")
