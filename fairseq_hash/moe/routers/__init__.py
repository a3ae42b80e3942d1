"""Routers: which expert serves which token, and how much its output weighs. One file a router."""

from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.routers.base import BaseRouter
from fairseq_hash.moe.routers.random_linear import RandomLinearRouter
from fairseq_hash.moe.routers.registry import (
    Router,
    RouterSettings,
    register_router,
    router_class,
    router_names,
    statistics_of,
)
from fairseq_hash.moe.routers.stable_moe import StableRouter
from fairseq_hash.moe.routers.switch import SwitchRouter
from fairseq_hash.moe.routers.topk import TopKRouter
from fairseq_hash.moe.routing_stats import statistic

__all__ = [
    "Assignment",
    "BaseRouter",
    "RandomLinearRouter",
    "Router",
    "RouterSettings",
    "StableRouter",
    "SwitchRouter",
    "TopKRouter",
    "register_router",
    "router_class",
    "router_names",
    "statistic",
    "statistics_of",
]
