"""What the sparse layers of one forward pass share: real tokens and hash routes. Shape suffixes: see `losses`."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.dispatch_plan import DispatchPlan, PlanUnderWay
from fairseq_hash.moe.read_ahead import ReadAhead
from fairseq_hash.moe.routing_stats import RoutingReport


@dataclass(frozen=True)
class HashRoute:
    """Where the tokens of one forward pass go by one hash table, made once for all layers that share the table.

    Attributes:
        assignment: experts, and weights where they are not learned.
        under_way: the plan. The layer that comes first waits for what it still needs of other ranks.
        segments: groups of rows that each expert has.
    """

    assignment: Assignment
    under_way: PlanUnderWay
    segments: int = 1

    @property
    def plan(self) -> DispatchPlan:
        """The finished plan."""
        return self.under_way.plan

    @cached_property
    def _report(self) -> Tensor:
        return RoutingReport.of(self.assignment, self.plan, segments=self.segments).sums

    def report(self) -> Tensor:
        """Return the packed report for a layer that takes this route.

        A tensor of its own for each: activation checkpointing makes what a layer returns a part of its graph.
        """
        return self._report.clone()


@dataclass(frozen=True)
class MemoryLookup:
    """Which rows of one memory the tokens of a forward pass look up (`memory_rows`).

    Attributes:
        row_TJ: int64, J rows of each token, counted through those of the rank that holds the row.
        under_way: the plan of the exchange between ranks that share the rows; None if this rank holds all.
    """

    row_TJ: Tensor
    under_way: "PlanUnderWay | None" = None


@dataclass(frozen=True)
class RoutedTokens:
    """What a router may see of a batch beside the activations. Padding is left out; positions come first.

    Attributes:
        id_T: int64, token ids.
        sentence_T: int64, the sentence of each token, from 0 to B - 1.
    """

    id_T: Tensor
    sentence_T: Tensor

    @cached_property
    def sentences(self) -> int:
        """How many sentences there are, up to the last one with a token; waits for the device, once a batch."""
        return int(self.sentence_T.max()) + 1 if len(self.sentence_T) else 0


@dataclass(frozen=True)
class RoutingContext:
    """What the sparse layers of one forward pass share.

    Attributes:
        place_T: int64, where the tokens that are no padding stand among all L x B, position first (`[L, B]`
            flattened); None where nothing is padding.
        hash_routes: one for each hash table.
        reports: each sparse layer's report, by its number and its router's name; filled in as the layers run.
        token_BL: int64, the token ids, padding included; None if no router sees them.
        update_sums: what a router wants to know after the update, of each layer that has such a router, as `reports`.
        memory_lookups: one for each memory, by the number of its decoder layer.
        read_ahead: the reader of experts that stay in files; None where there are none.
    """

    place_T: "Tensor | None"
    hash_routes: list[HashRoute] = field(default_factory=list)
    reports: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    token_BL: "Tensor | None" = None
    update_sums: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    memory_lookups: dict[int, MemoryLookup] = field(default_factory=dict)
    read_ahead: "ReadAhead | None" = None

    @classmethod
    def of_tokens(cls, token_BL: Tensor, padding: int) -> "RoutingContext":
        """Make the context for token ids `[B, L]`, leaving out the padding."""
        real_N = token_BL.t().flatten() != padding
        return cls(None if real_N.all() else real_N.nonzero().squeeze(1), token_BL=token_BL)

    @property
    def num_tokens(self) -> int:
        """T, without waiting for the device."""
        if self.place_T is not None:
            return len(self.place_T)
        return 0 if self.token_BL is None else self.token_BL.numel()

    @cached_property
    def tokens(self) -> RoutedTokens:
        """The tokens, for routers that see them."""
        if self.token_BL is None:
            raise ValueError("this router sees tokens; make the context with RoutingContext.of_tokens")
        sentence_B = torch.arange(len(self.token_BL), device=self.token_BL.device)
        return RoutedTokens(self.select(self.token_BL), self.select(sentence_B.unsqueeze(1).expand_as(self.token_BL)))

    def select(self, value_BL: Tensor) -> Tensor:
        """Return `[T]`: the values of the tokens that are no padding, position first."""
        value_N = value_BL.t().flatten()
        return value_N if self.place_T is None else value_N[self.place_T]

    def drop_padding(self, x_LBD: Tensor) -> Tensor:
        """Return `[T, D]`: the tokens of `x_LBD` that are no padding."""
        x_ND = x_LBD.reshape(-1, x_LBD.shape[-1])
        return x_ND if self.place_T is None else x_ND.index_select(0, self.place_T)

    def restore_padding(self, y_TD: Tensor, shape_LBD: torch.Size) -> Tensor:
        """Return `[L, B, D]`: the opposite of `drop_padding`, with zeros where padding stands."""
        if self.place_T is not None:
            y_ND = y_TD.new_zeros(shape_LBD[0] * shape_LBD[1], shape_LBD[2])
            y_TD = y_ND.index_copy(0, self.place_T, y_TD)
        return y_TD.view(shape_LBD)
