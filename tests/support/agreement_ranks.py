"""What several ranks do to agree; `ranks` runs these functions."""

import multiprocessing
import sys
import threading

import torch.distributed as dist

from fairseq_hash.core.errors import UserError
from fairseq_hash.parallel.collectives import check_same, run_on_all_ranks
from fairseq_hash.parallel.watchdog import FAILURE, watchdog_of


def agree():
    """Return what `run_on_all_ranks` and `check_same` give where no, one, or every rank fails or differs."""
    rank = dist.get_rank()

    def fail(error, ranks):
        if rank in ranks:
            raise error
        return rank

    def message(work, *arguments):
        try:
            return work(*arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    every = range(dist.get_world_size())
    return [
        message(run_on_all_ranks, lambda: fail(None, ())),
        message(run_on_all_ranks, lambda: fail(UserError("give another"), (1,))),
        message(run_on_all_ranks, lambda: fail(OSError("no disc\nat all"), (1, 2))),
        message(run_on_all_ranks, lambda: fail(OSError(f"no disc of {rank}"), every)),
        message(check_same, {"width": 3, "seed": 1}),
        message(check_same, {"width": 3, "seed": 1 if rank < 2 else 5}),
    ]


def errors_of_others():
    """Return how a data loader's worker ends, and whether this rank lives, after errors that are not this rank's."""

    def report():
        try:
            raise ConnectionResetError("made for the test")
        except ConnectionResetError:
            sys.excepthook(*sys.exc_info())

    watchdog_of(dist.get_rank(), dist.get_world_size())
    thread = threading.Thread(target=report)
    thread.start()
    thread.join()
    worker = multiprocessing.get_context("fork").Process(target=report)
    worker.start()
    worker.join()
    return worker.exitcode, dist.distributed_c10d._get_default_store().check([FAILURE])
