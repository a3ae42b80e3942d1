"""Routers: which expert serves which token, and how much its output weighs. One file a router."""

from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.routers.base import BaseRouter
from fairseq_hash.moe.routers.expert_choice import ExpertChoiceRouter
from fairseq_hash.moe.routers.gshard import GShardRouter
from fairseq_hash.moe.routers.random_linear import RandomLinearRouter
from fairseq_hash.moe.routers.registry import (
    Router,
    RouterSettings,
    register_router,
    router_class,
    router_names,
    sees_future,
    statistics_of,
)
from fairseq_hash.moe.routers.sinkhorn import SinkhornRouter
from fairseq_hash.moe.routers.stable_moe import StableRouter
from fairseq_hash.moe.routers.switch import SwitchRouter
from fairseq_hash.moe.routers.topk import TopKRouter
from fairseq_hash.moe.routing_stats import statistic

__all__ = [
    "Assignment",
    "BaseRouter",
    "ExpertChoiceRouter",
    "GShardRouter",
    "RandomLinearRouter",
    "Router",
    "RouterSettings",
    "SinkhornRouter",
    "StableRouter",
    "SwitchRouter",
    "TopKRouter",
    "register_router",
    "router_class",
    "router_names",
    "sees_future",
    "statistic",
    "statistics_of",
]
