"""The routers by their names: what a router is, and how one becomes known to `--router`.

A router needs nothing but this: a class with `register_router` above it, imported before the model is built.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

from fairseq_hash.core.errors import UserError
from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.routing_stats import OF_ALL_LAYERS, OF_MONITOR, NoStatistics, names_of
from fairseq_hash.parallel.groups import ExpertParallel

RESERVED = ("none", "hash")  # no routers: a dense model, and layers whose tables choose

Class = TypeVar("Class", bound=Any)


@dataclass(frozen=True)
class RouterSettings:
    """What a router is built from.

    Attributes:
        model_width: D.
        num_experts: E.
        layer: number of the decoder layer, from 0; also the key of the router's random numbers (`seeded_generator`).
        parallel: who shares the experts, for routers whose ranks decide together.
        options: the options of the model's sparse layers (`SparseOptions`).
        vocabulary: V, symbols of the dictionary, for routers that see token ids.
    """

    model_width: int
    num_experts: int
    layer: int
    parallel: ExpertParallel
    options: Any
    vocabulary: int = 0


class Router(Protocol):
    """A module that picks experts for tokens. It knows nothing of ranks' experts or of padding.

    Attributes:
        top_k: K, experts of a token; of the class, or of each router where an option says it.
        statistics: the dataclass of what it wants logged (`routing_stats.statistic`), or `NoStatistics`.

    A router may have a class attribute `sees_tokens = True`. It is then called with a second argument, the
    `RoutedTokens` of the batch: token ids and sentences.

    A router may have a class attribute `sees_future = True`: where a token goes depends on later tokens. A model with
    it is an oracle: its perplexity is called an oracle's, and it does not generate.

    A router may have a method `after_update(tokens_per_expert_E)`. Every rank calls it after each update of the
    weights, with how many tokens of the update chose each expert (fp64 `[E]`), over all ranks and accumulated batches.
    What it keeps in buffers is saved and loaded with the model. If its assignments have `update_sums_N`, the method
    gets their sum over the same batches as a second argument (fp64 `[N]`).
    """

    top_k: int
    statistics: ClassVar[type]

    @classmethod
    def build(cls, settings: RouterSettings) -> nn.Module:
        """Make the router of one layer."""

    def __call__(self, x_TD: Tensor) -> Assignment:
        """Assign `x_TD`, the tokens of this rank's batch (any floating dtype, T may be 0), to experts."""


_ROUTERS: dict[str, Any] = {}


def register_router(name: str) -> Callable[[Class], Class]:
    """Make a class known as `--router NAME`.

    Raises:
        UserError: if the name is taken, or not made of small letters, digits, `_` and `-`, or if a statistic has a
            name that is logged of every layer.
    """
    if name in (*RESERVED, *_ROUTERS):
        raise UserError(f"a router {name!r} is there already; give the new one another name")
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise UserError(f"{name!r} cannot be a router's name; use small letters, digits, _ and -")

    def register(router: Class) -> Class:
        for taken in set(names_of(router.statistics)) & {*OF_ALL_LAYERS, *OF_MONITOR}:
            raise UserError(f"a statistic of the router {name!r} is called {taken}, as one of every layer; rename it")
        _ROUTERS[name] = router
        return router

    return register


def router_names() -> tuple[str, ...]:
    """Return the names of all routers."""
    return tuple(_ROUTERS)


def router_class(name: str) -> Any:
    """Return the router of a name. Raises `KeyError` if there is none."""
    return _ROUTERS[name]


def sees_future(name: str) -> bool:
    """Return whether the router of a name sees later tokens than the one it routes."""
    return getattr(_ROUTERS.get(name), "sees_future", False)


def statistics_of(name: str) -> type:
    """Return the dataclass of the statistics of a router; of hash layers, `NoStatistics`."""
    return NoStatistics if name in RESERVED else _ROUTERS[name].statistics
