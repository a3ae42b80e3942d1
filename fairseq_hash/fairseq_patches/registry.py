"""The tools of this folder: replace functions of fairseq, and turn our errors into one line."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

import torch.distributed as dist

from fairseq_hash.core.errors import UserError

Result = TypeVar("Result")


def override(owner: Any, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Replace a method or function by the decorated one, which gets the original before all other arguments."""
    original = getattr(owner, name)

    def replace(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        setattr(owner, name, method)
        return function

    return replace


def training_loops() -> list[ModuleType]:
    """Return fairseq_cli/train.py as it is imported: under `python -m` it is `__main__`, and a second time itself."""
    modules = [sys.modules[name] for name in ("__main__", "fairseq_cli.train") if name in sys.modules]
    return [module for module in modules if hasattr(module, "validate_and_save")]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let an attribute have another value in this context."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def one_line_errors(function: Callable[..., Result]) -> Callable[..., Result]:
    """Turn a `UserError` at a place that fairseq calls into an exit with its one line.

    Upstream: fairseq's commands show every exception as a traceback, `Trainer.load_checkpoint` replaces the message of
    any `Exception`, and Hydra prints its own summary of it. `SystemExit` passes through all three. Where there are
    several ranks, all of them raise the error: rank 0 prints it.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Result:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            line = f"fairseq_hash: {error}"
            if not dist.is_initialized():
                raise SystemExit(line) from error
            if dist.get_rank() == 0:
                print(line, file=sys.stderr, flush=True)
            dist.barrier()  # launchers stop all ranks when one ends: not before the line is out
            raise SystemExit(1) from error

    return call
