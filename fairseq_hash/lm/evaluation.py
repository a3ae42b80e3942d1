"""Whether models are loaded to be evaluated: such a model holds all experts, and the checkpoint's hash table."""

from collections.abc import Iterator
from contextlib import contextmanager

_is_evaluation = False


@contextmanager
def loading_to_evaluate() -> Iterator[None]:
    """Let models that are built in this context hold all experts on every rank, and take their table when they load.

    For commands in which ranks call a model unequally often; a rank that waits for the others would wait for ever.
    """
    global _is_evaluation
    before, _is_evaluation = _is_evaluation, True
    try:
        yield
    finally:
        _is_evaluation = before


def is_evaluation() -> bool:
    """Return whether the context is `loading_to_evaluate`."""
    return _is_evaluation
