"""Evaluation of models whose experts do not fit into memory: they stay in the checkpoint's files."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_hash.core.errors import UserError
from fairseq_hash.moe.kernels.group_sizes import GroupSizes


class MappedExperts(nn.Module):
    """Experts without weights of their own; `forward` brings those of this layer in, and lets go of them.

    For evaluation only: there are no parameters to train, and no gradients.
    """

    def __init__(self, experts: nn.Module) -> None:
        """Take experts that were built on the device `meta`."""
        super().__init__()
        # In a tuple, which hides the parameters without data from everything that goes through a model.
        self._shell = (experts.eval(),)
        self._saved: dict[str, Any] = {}

    @property
    def shell(self) -> nn.Module:
        """The experts, without data."""
        return self._shell[0]

    def leave_in_file(self, name: str, saved: Any) -> None:
        """Take where a parameter lies: a mapped tensor, or `SavedExperts`, whose checksums are looked at here."""
        if not isinstance(saved, Tensor):
            saved.verify()
        self._saved[name] = saved

    def forward(self, rows_RD: Tensor, sizes: "GroupSizes | Sequence[int]") -> Tensor:
        """Apply the experts, as the module they stand for would."""
        if len(self._saved) < len(dict(self.shell.named_parameters())):
            raise UserError("experts that stay in a checkpoint's files need a checkpoint; load one first")
        weights = {name: tensor.to(rows_RD.device, rows_RD.dtype) for name, tensor in self.mapped().items()}
        with torch.no_grad():
            return torch.func.functional_call(self.shell, weights, (rows_RD, sizes), strict=True)

    def mapped(self) -> dict[str, Tensor]:
        """Return the parameters by name, in the files: what is read of them comes into memory, and can go again."""
        return {name: saved if isinstance(saved, Tensor) else saved.mapped() for name, saved in self._saved.items()}
