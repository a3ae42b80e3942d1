"""Experts beside one another on the cores of a CPU: each on one thread, in place of each on all threads in turn.

An expert's matrix products are small: 64 rows and less. Cut over threads they are smaller still, and every one of them
waits for the slowest part; experts of their own are cut nowhere, and wait once.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

LEAST_WORK = 2**22
"""Multiplications, below which threads take longer to start than to work."""

_pool: "ThreadPoolExecutor | None" = None
_in_use = threading.Lock()


def _forget() -> None:
    """Threads do not live on in a forked process."""
    global _pool, _in_use
    _pool, _in_use = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def _workers(number: int) -> ThreadPoolExecutor:
    global _pool
    if _pool is None or _pool._max_workers < number:
        _pool = ThreadPoolExecutor(number, thread_name_prefix="experts")
    return _pool


def for_each_group(job: Callable[[int, int, int], None], sizes: Sequence[int], work_per_row: int, on_cpu: bool) -> None:
    """Call `job(group, first row, row after the last)` for every group that has rows, in no particular order.

    Args:
        job: writes results of its own only, without autograd or autocast, on several threads at a time where that is
            faster.
        sizes: rows of each group.
        work_per_row: multiplications.
        on_cpu: False for a device with a queue, which one thread fills.
    """
    groups, end = [], 0
    for group, size in enumerate(sizes):
        if size:
            groups.append((group, end, end + size))
            end += size
    threads = torch.get_num_threads() if on_cpu else 1
    largest = max(sizes, default=0)
    # With few groups, or one that is most of the work, cores would stand idle: there, all of them serve each in turn.
    is_even = largest * threads <= 1.25 * end
    if threads == 1 or not is_even or end * work_per_row < LEAST_WORK or not _in_use.acquire(blocking=False):
        for place, start, stop in groups:
            job(place, start, stop)
        return
    try:
        _on_threads(job, sorted(groups, key=lambda group: group[1] - group[2]), threads)
    finally:
        _in_use.release()


def _on_threads(job: Callable[[int, int, int], None], groups: "list[tuple[int, int, int]]", threads: int) -> None:
    left = iter(groups)  # each thread takes the next: the largest come first, so that all end at about the same time
    inference = torch.is_inference_mode_enabled()

    def work() -> None:
        # How many threads a product takes, and what torch is to record, is known of each thread by itself. On one
        # thread everywhere, a product gives the same bits whichever thread it falls to.
        torch.set_num_threads(1)
        with torch.inference_mode(inference), torch.no_grad():
            for group in left:
                job(*group)

    others = [_workers(threads - 1).submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        for other in others:
            other.exception()  # waits
        torch.set_num_threads(threads)
    for other in others:
        other.result()
