"""A rank that fails, anywhere in a command."""

import functools
from collections.abc import Callable
from typing import Any

from fairseq_hash.fairseq_patches.registry import override
from fairseq_hash.parallel.watchdog import ended_by_errors


@override("fairseq.distributed.utils", "call_main")
def _end_the_job(original: Callable[..., None], cfg: Any, main: Callable[..., None], **kwargs: Any) -> None:
    """End the job, with the cause, for an error anywhere in a rank that shares experts.

    Upstream: an error goes up to who started the command. Hydra and torch's `spawn` show it and end this process alone,
    and the other ranks can say only that it is gone. `spawn` calls `main` in other processes, which pickle finds by
    name.
    """
    ended_by_errors(original, cfg, functools.partial(ended_by_errors, main), **kwargs)
