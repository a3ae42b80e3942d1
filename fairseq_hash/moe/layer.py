"""The sparse layer: router, dispatch, experts, combine. Shape suffixes: see `losses`."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from fairseq_hash.checkpoint.expert_loading import take_own_experts
from fairseq_hash.moe.fairscale_dispatcher import fairscale_moe
from fairseq_hash.moe.mapped_experts import MappedExperts
from fairseq_hash.moe.routers import Assignment
from fairseq_hash.moe.token_dispatcher import DispatchPlan, PlanUnderWay, combine, dispatch, plan_dispatch
from fairseq_hash.parallel.groups import ExpertParallel


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
        return RoutingReport.of(self.assignment, self.plan, self.segments).pack()

    def report(self) -> Tensor:
        """Return the packed report for a layer that takes this route.

        A tensor of its own for each: activation checkpointing makes what a layer returns a part of its graph.
        """
        return self._report.clone()


@dataclass(frozen=True)
class RoutingContext:
    """What the sparse layers of one forward pass share.

    Attributes:
        place_T: int64, where the tokens that are no padding stand among all L x B, position first (`[L, B]`
            flattened); None where nothing is padding.
        hash_routes: one for each hash table.
        reports: each sparse layer's report, by its number and its router's name; filled in as the layers run.
    """

    place_T: "Tensor | None"
    hash_routes: list[HashRoute] = field(default_factory=list)
    reports: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    @classmethod
    def of_tokens(cls, token_BL: Tensor, padding: int) -> "RoutingContext":
        """Make the context for token ids `[B, L]`, leaving out the padding."""
        real_N = token_BL.t().flatten() != padding
        return cls(None if real_N.all() else real_N.nonzero().squeeze(1))

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


@dataclass(frozen=True)
class RoutingReport:
    """What one sparse layer did to one batch. Every value is a sum over tokens, so reports of several batches add up.

    It travels as one fp32 vector `[5 + E]`, because activation checkpointing keeps gradients of tensors only.
    """

    tokens: Tensor
    dropped: Tensor
    entropy: Tensor
    load_balancing_loss: Tensor
    z_loss: Tensor
    demand_E: Tensor

    @classmethod
    def of(cls, assignment: Assignment, plan: DispatchPlan, segments: int = 1) -> "RoutingReport":
        """Sum up an assignment and its plan, in which each expert has `segments` groups of rows."""
        tokens = plan.shape_TK[0]
        demand_E = plan.demand_E.view(-1, segments).sum(dim=1) if segments > 1 else plan.demand_E
        # Filled in on the device: a tensor made of a number is copied there, and waited for.
        scalars = torch.zeros(5, device=demand_E.device)
        scalars[0].fill_(tokens)
        scalars[1].fill_(plan.dropped / plan.shape_TK[1])
        # Out of place: these have gradients.
        means = (assignment.entropy, assignment.load_balancing_loss, assignment.z_loss)
        totals = (zero if mean is None else mean * tokens for zero, mean in zip(scalars[2:], means, strict=True))
        return cls(*scalars[:2], *totals, demand_E.float())

    @property
    def relative_load_E(self) -> Tensor:
        """Demand for each expert over the mean demand; zero where there is no token."""
        return self.demand_E / self.demand_E.mean().clamp(min=1e-12)

    def mean(self, total: Tensor) -> Tensor:
        """Return a total over tokens as a mean; zero where there is no token."""
        return total / self.tokens.clamp(min=1)

    def pack(self) -> Tensor:
        """Return the report as a vector."""
        scalars = (self.tokens, self.dropped, self.entropy, self.load_balancing_loss, self.z_loss)
        return torch.cat([torch.stack(scalars), self.demand_E])

    @classmethod
    def unpack(cls, report: Tensor) -> "RoutingReport":
        """Return the report that a vector holds."""
        return cls(*report[:5], report[5:])


class SparseLayer(nn.Module):
    """E experts, this rank's share of them, and what picks among them: a router, or one of the context's hash routes.

    `forward` returns what the experts add (zero for padding and for dropped tokens) and a packed `RoutingReport`. Ranks
    that share experts have to call it equally often, with any number of tokens. `expert_size` is the number of
    parameters of one expert.
    """

    def __init__(
        self,
        router: "nn.Module | None",
        experts: nn.Module,
        parallel: ExpertParallel,
        capacity_factor: float,
        eval_capacity_factor: float,
        hash_route: "int | None" = None,
        segments: int = 1,
        choices: int = 1,
        shared: "nn.Module | None" = None,
    ) -> None:
        """Make the layer.

        Args:
            router: a learned router; in a hash layer `HashWeights` or nothing.
            experts: this rank's.
            parallel: who shares the experts.
            capacity_factor: of the training batch; a hash route has its own.
            eval_capacity_factor: the same in evaluation.
            hash_route: number of the context's route, for a hash layer.
            segments: N, into which MultiHash cuts the experts' hidden width; each is a group of rows.
            choices: K, experts of a token.
            shared: one more expert, for every token.
        """
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared
        self.parallel = parallel
        self.groups = parallel.in_segments(segments)
        self.hash_route = hash_route
        self.segments = segments
        self.choices = choices
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        held = experts.shell if isinstance(experts, MappedExperts) else experts
        self.expert_size = sum(p.numel() for p in held.parameters()) // parallel.local_experts
        take_own_experts(self, parallel, {f"experts.{name}": p.shape for name, p in held.named_parameters()})

    def route(self, x_TD: Tensor, context: RoutingContext) -> tuple[Assignment, DispatchPlan, Tensor]:
        """Return which experts serve the tokens `x_TD`, how their rows lie, and the packed report."""
        if self.hash_route is None:
            assignment = self.router(x_TD)
            factor = self.capacity_factor if self.training else self.eval_capacity_factor
            plan = plan_dispatch(assignment.expert_TK, self.parallel, factor)
            return assignment, plan, RoutingReport.of(assignment, plan).pack()
        route = context.hash_routes[self.hash_route]
        assignment = route.assignment
        if self.router is not None:
            assignment = assignment._replace(weight_TK=self.router(x_TD, assignment.expert_TK))
        return assignment, route.plan, route.report()

    def forward(self, x_LBD: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor]:
        """Return y of the shape and dtype of `x_LBD`, and the report vector (fp32, `[5 + E]`)."""
        x_TD = context.drop_padding(x_LBD)
        assignment, plan, report = self.route(x_TD, context)
        if self.parallel.dispatch == "fairscale":
            y_TD = fairscale_moe(x_TD, assignment, plan, self.experts, self.groups)
        else:
            rows_RD = self.experts(dispatch(x_TD, plan), plan.sizes)
            y_TD = combine(rows_RD, plan, assignment.weight_TK)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD, (len(x_TD),))
        return context.restore_padding(y_TD, x_LBD.shape), report
