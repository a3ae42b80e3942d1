"""The sparse layer: router, token dispatcher, experts. Shape suffixes: see `losses`."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.dispatch_plan import DispatchPlan, random_order
from fairseq_hash.moe.layer_meter import LayerMeter
from fairseq_hash.moe.mapped_experts import MappedExperts
from fairseq_hash.moe.routing_context import RoutingContext
from fairseq_hash.moe.routing_stats import NoStatistics, RoutingReport
from fairseq_hash.moe.token_dispatcher import Experts, TokenDispatcher


class SparseLayer(nn.Module):
    """E experts, this rank's share of them, and what picks among them: a router, or one of the context's hash routes.

    `forward` returns what the experts add (zero for padding and for dropped tokens) and the sums of a `RoutingReport`.
    With a norm it returns that of x plus this sum, and zero for padding: the code of Hash Layers (ParlAI,
    projects/params_vs_compute/hash_ladder/hash_ladder.py, `HashLayerFFN`) has one norm for all experts of a layer.
    Ranks that share experts have to call it equally often, with any number of tokens.

    Attributes:
        expert_size: number of parameters of one expert.
        active_size: number of parameters of the experts that one token uses, the shared one left out.
        top_k: K, experts of a token.
        meter: what the layer counts into while it is measured; None otherwise.
    """

    def __init__(
        self,
        router: Any,
        experts: nn.Module,
        dispatcher: TokenDispatcher,
        capacity_factor: float = 0.0,
        eval_capacity_factor: float = 0.0,
        *,
        hash_route: "int | None" = None,
        hash_weights: "nn.Module | None" = None,
        segments: int = 1,
        top_k: int = 1,
        shared: "nn.Module | None" = None,
        norm: "nn.Module | None" = None,
        drops_randomly: bool = False,
    ) -> None:
        """Make the layer.

        Args:
            router: a `Router`, or None in a hash layer.
            experts: this rank's.
            dispatcher: what brings tokens to the experts.
            capacity_factor: of the training batch; a hash route has its own.
            eval_capacity_factor: the same in evaluation.
            hash_route: number of the context's route, for a hash layer.
            hash_weights: `HashWeights`, for a hash layer that learns the weights of a token's experts.
            segments: N, into which MultiHash cuts the experts' hidden width; each is a group of rows.
            top_k: K of a hash layer; a router says its own.
            shared: one more expert, for every token.
            norm: of x and what the experts add, for a layer that returns LN(x + FFN(x)).
            drops_randomly: in training, an expert over its capacity drops random tokens; a hash route has its own.
        """
        super().__init__()
        # Checkpoints know the learned weights of a hash layer by the name `router`.
        self.router: Any = router if hash_weights is None else hash_weights
        self.experts = experts
        self.shared = shared
        self.norm = norm
        self.drops_randomly = drops_randomly
        self.parallel = dispatcher.parallel
        self.dispatcher = dispatcher.in_segments(segments)
        self.hash_route = hash_route
        self.segments = segments
        self.top_k = top_k if router is None else router.top_k
        self.statistics: type = NoStatistics if router is None else router.statistics
        self.router_sees_tokens: bool = getattr(router, "sees_tokens", False)
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        held = experts.shell if isinstance(experts, MappedExperts) else experts
        self.expert_size = sum(p.numel() for p in held.parameters()) // self.parallel.local_experts
        self.active_size = self.top_k * self.expert_size
        self.meter: LayerMeter | None = None

    def route(self, x_TD: Tensor, context: RoutingContext) -> tuple[Assignment, DispatchPlan, Tensor]:
        """Return which experts serve the tokens `x_TD`, how their rows lie, and the sums of the report."""
        if self.hash_route is None:
            assignment = self.router(x_TD, *((context.tokens,) if self.router_sees_tokens else ()))
            factor = self.capacity_factor if self.training else self.eval_capacity_factor
            order_C = assignment.order_C
            if order_C is None and self.training and self.drops_randomly and factor:
                order_C = random_order(assignment.expert_TK)
            plan = self.dispatcher.begin(assignment.expert_TK, factor, order_C).plan
            if assignment.over_kept:
                assignment = assignment._replace(weight_TK=plan.over_kept(assignment.weight_TK))
            report = RoutingReport.of(assignment, plan, self.statistics).sums
            if assignment.update_sums_N is not None:
                report = torch.cat([report, assignment.update_sums_N])
            return assignment, plan, report
        route = context.hash_routes[self.hash_route]
        assignment = route.assignment
        if self.router is not None:
            assignment = assignment._replace(weight_TK=self.router(x_TD, assignment.expert_TK))
        return assignment, route.plan, route.report()

    def needed(self, mapped: MappedExperts, context: RoutingContext) -> Sequence[int]:
        """Return which of its experts in files the layer will need, as far as that is known before it runs.

        What a router will choose is not known: all of them, if there are as many rows as experts, and else none.
        """
        if self.hash_route is not None:
            return mapped.serving(context.hash_routes[self.hash_route].plan.sizes)
        experts = self.parallel.num_experts
        return range(experts) if context.num_tokens * self.top_k >= experts else ()

    def forward(self, x_LBD: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor]:
        """Return y of the shape and dtype of `x_LBD`, and the sums of the report (fp32, `[2 + S + E]`).

        After them come the N sums that the router wants after the update, if it does (`[2 + S + E + N]`).
        """
        x_TD = context.drop_padding(x_LBD)
        assignment, plan, report = self.route(x_TD, context)
        experts: Experts = self.experts
        if context.read_ahead is not None and isinstance(self.experts, MappedExperts):
            experts = functools.partial(context.read_ahead.run, self.experts)
        if self.meter is None:
            y_TD = self.dispatcher.run(x_TD, assignment, plan, experts)
        else:
            y_TD = self._measured(x_TD, assignment, plan, self.meter)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD, (len(x_TD),))
        if self.norm is not None:
            y_TD = self.norm(x_TD + y_TD)
        return context.restore_padding(y_TD, x_LBD.shape), report

    def _measured(self, x_TD: Tensor, assignment: Assignment, plan: DispatchPlan, meter: LayerMeter) -> Tensor:
        meter.count(plan, assignment.expert_TK, self.segments)
        self.parallel.traffic.meter = meter.exchange
        try:
            return self.dispatcher.run(x_TD, assignment, plan, self.experts)
        finally:
            self.parallel.traffic.meter = None
