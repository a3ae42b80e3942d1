"""Rounds of calls: calls to compare run in turn, in one process, so that a ratio compares the same moment.

A `Call` is forward and backward; clearing gradients is outside the measured time. Peak memory is measured in calls of
its own: on a GPU by torch's allocator; on Linux by the process's peak resident memory, which the kernel resets on
request; elsewhere not at all. Memory kept from one call to the next is released before, so that it counts.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fairseq_hash.moe.kernels import huge_pages

MEMORY_CALLS = 3


@dataclass(frozen=True)
class Call:
    """One thing to measure.

    Attributes:
        forward: computes the output.
        leaves: the tensors that get gradients.
        grad: the gradient of the output; None if there is no backward pass, in which case autograd is off.
    """

    forward: Callable[[], "Tensor | None"]
    leaves: Sequence[Tensor] = ()
    grad: "Tensor | None" = None

    def run(self) -> "Tensor | None":
        """Run forward, and backward if there is a gradient; return the output."""
        with torch.set_grad_enabled(self.grad is not None):
            y = self.forward()
        if self.grad is not None:
            y.backward(self.grad)
        return y

    def clear(self) -> None:
        """Release the gradients."""
        for leaf in self.leaves:
            leaf.grad = None


def graphed(call: Call) -> Call:
    """Return a call as the replay of its CUDA graph: the time of the device without that of the host.

    Raises the errors of the capture if the call waits for the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # one-time work runs before
        call.run()
        call.clear()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run()
    call.clear()
    return Call(graph.replay)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of all rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: "Sequence[float] | np.ndarray") -> "Spread":
        """Sum values up."""
        low, median, high = np.quantile(np.asarray(values, dtype=np.float64), (0.25, 0.5, 0.75)).tolist()
        return cls(median, low, high)

    def text(self, factor: float = 1.0, digits: str = ".1f") -> str:
        """Return the median (quartiles), in other units."""
        median, low, high = (f"{factor * value:{digits}}" for value in (self.median, self.low, self.high))
        return f"{median} ({low} to {high})"

    def as_seconds(self) -> dict[str, float]:
        """Return a time in its JSON form."""
        return {"seconds": self.median, "low": self.low, "high": self.high}


def seconds_of(call: Call, device: torch.device) -> float:
    """Return the time of one call, from an idle device to an idle device."""
    if device.type != "cuda":
        start = time.perf_counter()
        call.run()
        seconds = time.perf_counter() - start
    else:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize(device)
        events[0].record()
        call.run()
        events[1].record()
        torch.cuda.synchronize(device)
        seconds = events[0].elapsed_time(events[1]) / 1000
    call.clear()
    return seconds


def in_rounds(calls: Mapping[str, Call], rounds: int, device: torch.device) -> "Iterator[dict[str, float]]":
    """Yield the seconds of each call, round by round. The first round is a warm-up and does not count.

    Every other round runs the calls in the opposite order, so that no call always follows the same one.
    """
    for number in range(rounds + 1):
        names = list(calls) if number % 2 else list(reversed(calls))
        seconds = {name: seconds_of(calls[name], device) for name in names}
        if number:
            yield {name: seconds[name] for name in calls}


def peak_bytes(call: Call, device: torch.device) -> "int | None":
    """Return the peak memory of a call minus the memory before it, output and gradients included.

    The median of a few calls; None if it cannot be measured.
    """
    gc.collect()
    peaks = [_peak_of_one(call, device) for _ in range(MEMORY_CALLS)]
    return None if None in peaks else int(statistics.median(peaks))


def _peak_of_one(call: Call, device: torch.device) -> "int | None":
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call.run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        if not reset_peak():
            return None
        before = resident("VmRSS")
        call.run()
        peak = resident("VmHWM")
    call.clear()
    return max(peak - before, 0)


def reset_peak() -> bool:
    """Reset the peak of resident memory to the present value; return whether the system can do that."""
    huge_pages.release()  # the kept memory of our experts' gradients
    try:
        # Otherwise the call could reuse freed memory that the allocator keeps, and this would not be counted.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def resident(name: str) -> int:
    """Return the resident memory of this process in bytes: `VmRSS` now, `VmHWM` at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {name}")
