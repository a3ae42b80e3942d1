"""What one sparse layer of one rank did in a measured update. Shape suffixes: see `losses`."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fairseq_hash.moe.dispatch_plan import DispatchPlan
from fairseq_hash.moe.kernels.group_sizes import count_groups
from fairseq_hash.parallel.exchange_meter import ExchangeMeter


@dataclass
class LayerMeter:
    """A layer that has one counts into it. Nothing here waits for the device.

    With activation checkpointing each pass counts twice, choices and drops alike: their ratio stays. A batch
    that fairseq fills in at the end of an epoch counts as any other.

    Attributes:
        exchange: what the exchanges of rows took.
        counts: int64 `[2, E]` of each pass: choices of this rank's tokens for each expert, and how many it dropped.
    """

    exchange: ExchangeMeter = field(default_factory=ExchangeMeter)
    counts: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def count(self, plan: DispatchPlan, expert_TK: Tensor, segments: int) -> None:
        """Count the choices of one pass, `expert_TK` (int64, groups of rows where an expert has several segments)."""
        chosen_G = plan.tokens_per_expert_E
        kept_G = count_groups(expert_TK.flatten().index_select(0, plan.choice_R), len(chosen_G))
        self.counts.append(torch.stack([chosen_G, chosen_G - kept_G]).view(2, -1, segments).sum(dim=2))

    def total_2E(self, experts: int, device: torch.device) -> Tensor:
        """Return the sums of all passes, fp64 `[2, E]`: choices and drops."""
        if not self.counts:
            return torch.zeros(2, experts, dtype=torch.float64, device=device)
        return torch.stack(self.counts).sum(dim=0).double()
