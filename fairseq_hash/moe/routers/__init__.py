"""Routers: which expert serves which token, and how much its output weighs. One file a router."""

from fairseq_hash.moe.routers.base import BaseRouter
from fairseq_hash.moe.routers.registry import (
    Router,
    RouterSettings,
    register_router,
    router_class,
    router_names,
    statistics_of,
)
from fairseq_hash.moe.routers.switch import SwitchRouter

__all__ = [
    "BaseRouter",
    "Router",
    "RouterSettings",
    "SwitchRouter",
    "register_router",
    "router_class",
    "router_names",
    "statistics_of",
]
