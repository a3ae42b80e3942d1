"""The overrides of fairseq's functions: recorded by decorators, applied together, each once."""

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

import fairseq

from fairseq_hash.fairseq_patches import ORDER
from fairseq_hash.fairseq_patches.upstream import INSTALL, is_known
from fairseq_hash.parallel.collectives import one_line_errors

logger = logging.getLogger(__name__)

Function = Callable[..., Any]


@dataclass(frozen=True)
class Override:
    """What takes the place of a function, or of another value, of fairseq.

    Attributes:
        owner: dotted path of the module or class that has it.
        name: its name there.
        function: what takes its place, with the original before all other arguments; or what makes the new value.
        reason: why, in one line: the first of the docstring.
        makes_value: whether `function` is called once, with the original alone, and returns what takes its place.
    """

    owner: str
    name: str
    function: Function
    reason: str
    makes_value: bool

    @property
    def target(self) -> str:
        """The dotted path of what is replaced."""
        return f"{self.owner}.{self.name}"

    @property
    def module(self) -> str:
        """The name of the module of this folder that records the override."""
        return self.function.__module__.rpartition(".")[2]

    def owners(self) -> list[Any]:
        """Return the owner; a command of fairseq's as often as it is imported, which may be never."""
        return imported(self.owner) if self.owner.startswith("fairseq_cli.") else [resolve_name(self.owner)]

    def replacement(self, original: Any) -> Any:
        """Return what takes the original's place."""
        if self.makes_value:
            return self.function(original)

        @functools.wraps(original)
        def method(*args: Any, **kwargs: Any) -> Any:
            return self.function(original, *args, **kwargs)

        return method


_recorded: list[Override] = []
_originals: dict[tuple[Any, Override], Any] = {}  # of what has been replaced


def override(owner: str, name: str, one_line: bool = False) -> Callable[[Function], Function]:
    """Record that the decorated function takes a function's place; it gets the original before all other arguments.

    Args:
        owner: dotted path of the module or class. A command (`fairseq_cli.train`) is not imported for it.
        name: the function's name there.
        one_line: whether a `UserError`, which every rank then has to raise, ends the command as `one_line_errors` does.
    """
    record = _recording(owner, name, makes_value=False)
    return (lambda function: record(one_line_errors(function))) if one_line else record


def replacement(owner: str, name: str) -> Callable[[Function], Function]:
    """Record that what the decorated function makes of a value takes its place; otherwise as `override`."""
    return _recording(owner, name, makes_value=True)


def _recording(owner: str, name: str, makes_value: bool) -> Callable[[Function], Function]:
    def record(function: Function) -> Function:
        reason = function.__doc__.strip().splitlines()[0]
        _recorded.append(Override(owner, name, function, reason, makes_value))
        return function

    return record


def overrides() -> list[Override]:
    """Return all overrides in the order in which they are applied, of one module as they stand in its file."""
    for module in ORDER:
        import_module(f"{__package__}.{module}")
    return sorted(_recorded, key=lambda entry: ORDER.index(entry.module))


def apply() -> None:
    """Apply every override whose owner is there and has not got it yet; a second call changes nothing.

    One warning names the functions of fairseq whose source is not the known one.

    Raises:
        SystemExit: with one line and before anything is changed, if fairseq lacks a function.
    """
    new = [(owner, entry) for entry in overrides() for owner in entry.owners() if (owner, entry) not in _originals]
    missing = [entry.target for owner, entry in new if not hasattr(owner, entry.name)]
    if missing:
        raise SystemExit(f"fairseq_hash: fairseq {fairseq.__version__} has no {', '.join(missing)}; {INSTALL}")
    changed = [entry.target for owner, entry in new if is_known(entry.target, getattr(owner, entry.name)) is False]
    if changed:
        logger.warning(
            f"fairseq {fairseq.__version__} has another {', '.join(dict.fromkeys(changed))} than the one that the "
            f"plugin replaces, so that results may be wrong; {INSTALL}"
        )
    for owner, entry in new:
        original = _originals[owner, entry] = getattr(owner, entry.name)
        setattr(owner, entry.name, entry.replacement(original))


def is_source_known(entry: Override) -> "bool | None":
    """Return whether the source of a target is the known one, applied or not; None if it is not fairseq's."""
    owner = resolve_name(entry.owner)
    return is_known(entry.target, _originals.get((owner, entry), getattr(owner, entry.name)))


def imported(command: str) -> list[ModuleType]:
    """Return a module of fairseq's commands as often as it is imported: under `python -m` it is `__main__`, too."""
    main, itself = sys.modules["__main__"], sys.modules.get(command)
    is_main = getattr(main, "__file__", None) == find_spec(command).origin
    return [module for module in (main if is_main else None, itself) if module is not None]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let an attribute have another value in this context."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
