"""What a command of fairseq's logs, corrected where it is said; no filter stays behind at its logger."""

import logging
from collections.abc import Callable
from typing import Any


class CommandLog:
    """A command's logger, for its module alone."""

    def __init__(self, logger: logging.Logger, corrected: Callable[[Any], Any]) -> None:
        """Correct what the command's `logger` is given at level INFO.

        `corrected` returns what to say in place of a message; None: nothing.
        """
        self._logger = logger
        self._corrected = corrected

    def info(self, message: Any, *args: Any) -> None:
        """Say the corrected message."""
        message = self._corrected(message)
        if message is not None:
            self._logger.info(message, *args, stacklevel=2)

    def __getattr__(self, name: str) -> Any:
        """Return all else of the logger."""
        return getattr(self._logger, name)
