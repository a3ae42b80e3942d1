from typing import Any

import torch
from torch import Tensor

class FairseqOptimizer:
    optimizer: torch.optim.Optimizer
    fp16_params: list[torch.nn.Parameter]
    fp32_params: list[torch.nn.Parameter]
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], optimizer_overrides: dict[str, Any] | None = ...) -> None: ...
    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Any = ...) -> Tensor: ...

def __getattr__(name: str) -> Any: ...
