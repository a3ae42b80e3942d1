"""What several ranks do to agree; `ranks` runs these functions."""

import torch.distributed as dist

from fairseq_hash.core.errors import UserError
from fairseq_hash.parallel.collectives import check_same, run_on_all_ranks


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
