"""`--optimizer fused_adam`: fairseq's Adam, its update made by torch's fused kernel, which goes through memory once.

Options, state and results are those of fairseq's `adam`, up to rounding; a checkpoint of either goes on with the other.

The kernel is called as `torch._fused_adamw_`, which is what `torch.optim.AdamW(fused=True)` calls itself. The public
function `torch.optim.adamw.adamw` adds 1 to every step count it is given: it would take a tensor of its own on the
device for each parameter, where fairseq's state has a Python number, and sort the parameters once more.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from fairseq.optim import FairseqOptimizer, adam, register_optimizer
from torch import Tensor, nn

from fairseq_hash import seams
from fairseq_hash.errors import UserError

# How many elements the kernel gets at a time. It bounds the memory of fp32 copies: 64 MiB for each of two tensors.
ELEMENTS = 2**24
MOMENTS = ("exp_avg", "exp_avg_sq")


class FusedAdam(adam.Adam):
    """fairseq's Adam by the fused kernel; parameters in 16 bits are updated in fp32 and rounded, as there."""

    def step(self, closure: "Callable[[], Any] | None" = None) -> Any:
        """Make one update of all parameters that have a gradient; return what `closure` returns."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            # One call of the kernel has one device, one type and one number of updates: a parameter that had no
            # gradient in some updates has made fewer.
            alike = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    step = self._prepare_state(parameter)
                    alike[parameter.device, parameter.dtype, step].append(parameter)
            for (_, _, step), parameters in alike.items():
                self._update(parameters, step, group)
        return loss

    def _prepare_state(self, parameter: nn.Parameter) -> int:
        """Make the moments what the kernel takes, count an update and return its number."""
        if parameter.grad.is_sparse:
            raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
        state, dtype = self.state[parameter], wide(parameter.dtype)
        if not state:
            state["step"] = 0
            for moment in MOMENTS:
                state[moment] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        for moment in MOMENTS:
            # With --memory-efficient-fp16 fairseq leaves them as they were loaded: on the CPU.
            state[moment] = state[moment].to(parameter.device, dtype).contiguous()
        state["step"] += 1
        return state["step"]

    def _update(self, parameters: Sequence[nn.Parameter], step: int, group: dict[str, Any]) -> None:
        device, dtype = parameters[0].device, wide(parameters[0].dtype)
        beta1, beta2 = group["betas"]
        # Filled on the device: a copy from the host would wait for it.
        steps = torch.full((), step, dtype=torch.float32, device=device)
        # fairseq adds eps to the root of the second moment as it is, the kernel after the correction of its bias.
        eps = group["eps"] / (1 - beta2**step) ** 0.5
        for pieces in self._pieces(parameters):
            values, gradients, *moments = ([tensor.to(dtype) for tensor in kind] for kind in zip(*pieces, strict=True))
            torch._fused_adamw_(
                values,
                gradients,
                *moments,
                [],
                [steps] * len(values),
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=eps,
                amsgrad=False,
                maximize=False,
            )
            if dtype != parameters[0].dtype:
                for (rounded, *_), value in zip(pieces, values, strict=True):
                    rounded.copy_(value)

    def _pieces(self, parameters: Sequence[nn.Parameter]) -> Iterator[list[tuple[Tensor, ...]]]:
        """Cut parameters, gradients and moments alike; yield lists of such pieces, of `ELEMENTS` together.

        The pieces are flat: on a CPU the kernel looks at memory alone, whatever the strides.
        """
        pieces, room, copies = [], ELEMENTS, []
        for parameter in parameters:
            value = parameter.data.contiguous()
            if not parameter.is_contiguous():
                copies.append((parameter, value))
            state = self.state[parameter]
            tensors = (value, parameter.grad.data.contiguous(), *(state[moment] for moment in MOMENTS))
            start, flat = 0, [tensor.view(-1) for tensor in tensors]
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
            parameter.data.copy_(value)


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

    @seams.one_line_errors
    def __init__(self, cfg: adam.FairseqAdamConfig, params: Sequence[nn.Parameter]) -> None:
        FairseqOptimizer.__init__(self, cfg)  # fairseq's Adam would look for apex
        for option in ("use_old_adam", "fp16_adam_stats", "tpu"):
            if getattr(cfg, option):
                raise UserError(
                    f"--{option.replace('_', '-')} does not go with --optimizer fused_adam; leave it out, or use "
                    "--optimizer adam"
                )
        self._optimizer = FusedAdam(params, **self.optimizer_config)
