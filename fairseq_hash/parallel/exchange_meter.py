"""Seconds and bytes of the exchanges of one layer, as this rank sees them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class ExchangeMeter:
    """What one layer's exchanges took while it was measured, forward and backward.

    On a GPU the time lies between two events of the stream: nothing waits for the device until `seconds` is asked for.

    Attributes:
        bytes: sent to other ranks; what stays on this rank is not counted.
        host_seconds: time on a CPU, in which this rank also waits for the other ranks.
        events: the beginnings and the ends of exchanges on a GPU.
    """

    bytes: int = 0
    host_seconds: float = 0.0
    events: "list[tuple[Any, Any]]" = field(default_factory=list)

    @contextmanager
    def exchange(self, size: int, device: torch.device) -> Iterator[None]:
        """Measure one exchange of `size` bytes in this context."""
        self.bytes += size
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.events.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self.host_seconds += time.perf_counter() - began

    def seconds(self) -> float:
        """Return the seconds of all exchanges; waits for a GPU to end them."""
        for _, end in self.events[-1:]:
            end.synchronize()
        return self.host_seconds + sum(start.elapsed_time(end) for start, end in self.events) / 1000
