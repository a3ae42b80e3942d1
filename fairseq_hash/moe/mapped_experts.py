"""Evaluation of models whose experts do not fit into memory: they stay in the checkpoint's files."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_hash.core.errors import UserError
from fairseq_hash.moe.kernels.group_sizes import GroupSizes


class MappedExperts(nn.Module):
    """Experts without weights of their own; `forward` brings those of this layer in, and lets go of them.

    For evaluation only: there are no parameters to train, and no gradients. Only what serves tokens is read.
    """

    def __init__(self, experts: nn.Module) -> None:
        """Take experts that were built on the device `meta`."""
        super().__init__()
        # In a tuple, which hides the parameters without data from everything that goes through a model.
        self._shell = (experts.eval(),)
        self._parts: dict[str, Sequence[Tensor]] = {}  # of each shard, `[e, ...]`
        self._rows: dict[str, list[Tensor]] = {}  # of each expert

    @property
    def shell(self) -> nn.Module:
        """The experts, without data."""
        return self._shell[0]

    def leave_in_file(self, name: str, saved: Any) -> None:
        """Take where a parameter lies: a mapped tensor, or `SavedExperts`, whose checksums are looked at here."""
        if not isinstance(saved, Tensor):
            saved.verify()
        self._parts[name] = [saved] if isinstance(saved, Tensor) else saved.parts
        self._rows[name] = [row for part in self._parts[name] for row in part]

    def serving(self, sizes: "GroupSizes | Sequence[int]") -> list[int]:
        """Return which experts have rows, in order."""
        return sorted({group // self.segments for group, size in enumerate(GroupSizes.of(sizes).host) if size})

    @property
    def segments(self) -> int:
        """Groups of rows of an expert."""
        return getattr(self.shell, "segments", 1)

    def chunks(self, most: int) -> list[range]:
        """Return all experts in runs of at most `most` bytes in the files, and of at least one expert.

        Raises:
            UserError: if there are no experts yet.
        """
        self._require_experts()
        count = len(next(iter(self._rows.values())))
        step = max(1, most // sum(rows[0].nbytes for rows in self._rows.values()))
        return [range(start, min(start + step, count)) for start in range(0, count, step)]

    def parts(self) -> list[Sequence[Tensor]]:
        """Return every parameter as its parts `[e, ...]`, one of each shard, in the files' memory."""
        return list(self._parts.values())

    def in_file(self, experts: Sequence[int]) -> list[Tensor]:
        """Return the rows of some experts of every parameter, in the files' memory."""
        return [rows[expert] for rows in self._rows.values() for expert in experts]

    def forward(self, rows_RD: Tensor, sizes: "GroupSizes | Sequence[int]", chunk: "range | None" = None) -> Tensor:
        """Apply the experts, as the module they stand for would; with `chunk`, these ones to rows and sizes of theirs.

        Raises:
            UserError: if there are no experts yet.
        """
        self._require_experts()
        first = 0 if chunk is None else chunk.start
        serving = [first + expert for expert in self.serving(sizes)]
        weights = {name: self._stacked(name, rows_RD, serving, chunk) for name in self._parts}
        with torch.no_grad():
            return torch.func.functional_call(self.shell, weights, (rows_RD, sizes), strict=True)

    def _require_experts(self) -> None:
        if len(self._parts) < len(dict(self.shell.named_parameters())):
            raise UserError("experts that stay in a checkpoint's files need a checkpoint; load one first")

    def _stacked(self, name: str, like: Tensor, serving: Sequence[int], chunk: "range | None") -> Tensor:
        """Return a parameter `[e, ...]` with device and dtype of `like`; what lies there in one piece is not copied.

        Of a copy, the rows of experts that serve no tokens hold anything: nothing looks at them.
        """
        first, rows = self._parts[name][0], self._rows[name]
        chunk = range(len(rows)) if chunk is None else chunk
        if len(first) == len(rows) and (first.device, first.dtype) == (like.device, like.dtype):
            return first[chunk.start : chunk.stop]
        stacked = like.new_empty(len(chunk), *first.shape[1:])
        for expert in serving:
            stacked[expert - chunk.start].copy_(rows[expert])
        return stacked
