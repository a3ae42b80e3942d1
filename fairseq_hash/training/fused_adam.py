"""`--optimizer fused_adam`: fairseq's Adam, its update made by torch's fused kernel, which goes through memory once.

Options, state and results are those of fairseq's `adam`, up to rounding; a checkpoint of either goes on with the other.

The kernel is called as `torch._fused_adamw_`, which is what `torch.optim.AdamW(fused=True)` calls itself. The public
function `torch.optim.adamw.adamw` adds 1 to every step count it is given: it would take a tensor of its own on the
device for each parameter, where fairseq's state has a Python number, and sort the parameters once more.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from fairseq.optim import FairseqOptimizer, adam, register_optimizer
from torch import Tensor, nn

from fairseq_hash.core.errors import UserError
from fairseq_hash.parallel.collectives import one_line_errors

# How many elements the kernel gets at a time. It bounds the memory of fp32 copies: 64 MiB for each of two tensors.
ELEMENTS = 2**24
MOMENTS = ("exp_avg", "exp_avg_sq")


class FusedAdam(adam.Adam):
    """fairseq's Adam by the fused kernel; parameters in 16 bits are updated in fp32 and rounded, as there."""

    supports_step_with_scale = True

    def step(self, closure: "Callable[[], Any] | None" = None, scale: "Tensor | float" = 1.0) -> Any:
        """Make one update, by the gradients divided by `scale`, of all parameters that have one.

        Return what `closure` returns. The kernel divides: a clipped gradient needs no pass of its own.
        """
        loss = None if closure is None else closure()
        for group in self.param_groups:
            # One call of the kernel has one device, one type and one number of updates: a parameter that had no
            # gradient in some updates has made fewer.
            alike = defaultdict(list)
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None:
                    step, *moments = self._prepare_state(parameter)
                    strides = parameter.stride()
                    # What the kernel takes is handed over as it is: time of the host, which a GPU would wait for.
                    is_whole = gradient.dtype == parameter.dtype == moments[0].dtype and all(
                        tensor.stride() == strides for tensor in (gradient, *moments)
                    )
                    alike[parameter.device, parameter.dtype, step, is_whole].append((parameter, gradient, *moments))
            for (device, _, step, is_whole), tensors in alike.items():
                self._update(tensors, device, step, is_whole, scale, group)
        return loss

    def _prepare_state(self, parameter: nn.Parameter) -> tuple[int, Tensor, Tensor]:
        """Count an update; return its number and the moments, made what the kernel takes."""
        if parameter.grad.is_sparse:
            raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
        state, device, dtype = self.state[parameter], parameter.device, wide(parameter.dtype)
        if not state:
            state["step"] = 0
            for name in MOMENTS:
                state[name] = torch.zeros(parameter.shape, dtype=dtype, device=device)
        for name in MOMENTS:
            moment = state[name]
            # With --memory-efficient-fp16 fairseq leaves them as they were loaded: on the CPU.
            if moment.device != device or moment.dtype != dtype or not moment.is_contiguous():
                state[name] = moment.to(device, dtype).contiguous()
        state["step"] += 1
        return state["step"], *(state[name] for name in MOMENTS)

    @torch.no_grad()
    def _update(
        self,
        tensors: Sequence[tuple[Tensor, ...]],
        device: torch.device,
        step: int,
        is_whole: bool,
        scale: "Tensor | float",
        group: dict[str, Any],
    ) -> None:
        """Update some parameters, each with its gradient and moments in `tensors`."""
        beta1, beta2 = group["betas"]
        # Filled on the device: a copy from the host would wait for it.
        steps = torch.full((), step, dtype=torch.float32, device=device)
        if torch.is_tensor(scale):
            scale = scale.to(device, torch.float32)
        elif scale != 1.0:
            scale = torch.full((), scale, dtype=torch.float32, device=device)
        else:
            scale = None
        # fairseq adds eps to the root of the second moment as it is, the kernel after the correction of its bias.
        eps = group["eps"] / (1 - beta2**step) ** 0.5
        options = {"lr": group["lr"], "weight_decay": group["weight_decay"], "beta1": beta1, "beta2": beta2, "eps": eps}
        options |= {"amsgrad": False, "maximize": False, "grad_scale": scale}
        for pieces in [tensors] if is_whole else self._pieces(tensors):
            values, gradients, *moments = map(list, zip(*pieces, strict=True))
            if not is_whole:
                dtype = moments[0][0].dtype
                values, gradients = ([tensor.to(dtype) for tensor in kind] for kind in (values, gradients))
            torch._fused_adamw_(values, gradients, *moments, [], [steps] * len(values), **options)
            for (rounded, *_), value in zip(pieces, values, strict=True):
                if rounded is not value:
                    rounded.copy_(value)

    @staticmethod
    def _pieces(tensors: Sequence[tuple[Tensor, ...]]) -> Iterator[list[tuple[Tensor, ...]]]:
        """Cut parameters, gradients and moments alike; yield lists of such pieces, of `ELEMENTS` together.

        The pieces are flat: on a CPU the kernel looks at memory alone, whatever the strides.
        """
        pieces, room, copies = [], ELEMENTS, []
        for parameter, *others in tensors:
            value = parameter.contiguous()
            if not parameter.is_contiguous():
                copies.append((parameter, value))
            start, flat = 0, [tensor.contiguous().view(-1) for tensor in (value, *others)]
            while start < value.numel():
                end = min(start + room, value.numel())
                pieces.append(tuple(tensor[start:end] for tensor in flat))
                start, room = end, room - (end - start)
                if room == 0:
                    yield pieces
                    pieces, room = [], ELEMENTS
        if pieces:
            yield pieces
        for parameter, value in copies:
            parameter.copy_(value)


@functools.cache  # else a call of torch for each parameter
def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type that an update of parameters of type `dtype` is made in: fp32 for 16 bits."""
    return torch.promote_types(dtype, torch.float32)


# The options are all of `adam`, those that are refused too: under Hydra, `optimizer._name=fused_adam` then makes any
# configuration of `adam` one of this optimizer.
@register_optimizer("fused_adam", dataclass=adam.FairseqAdamConfig)
class FairseqAdam(adam.FairseqAdam):
    """`FusedAdam` as fairseq's trainer takes it.

    It has the name of fairseq's class because a checkpoint has that name, and the trainer resumes with no other.
    """

    @one_line_errors
    def __init__(self, cfg: adam.FairseqAdamConfig, params: Sequence[nn.Parameter]) -> None:
        FairseqOptimizer.__init__(self, cfg)  # fairseq's Adam would look for apex
        for option in ("use_old_adam", "fp16_adam_stats", "tpu"):
            if getattr(cfg, option):
                raise UserError(
                    f"--{option.replace('_', '-')} does not go with --optimizer fused_adam; leave it out, or use "
                    "--optimizer adam"
                )
        self._optimizer = FusedAdam(params, **self.optimizer_config)
