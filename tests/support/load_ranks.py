"""What several ranks get of batches that a table routes; `ranks` runs this."""

import torch
import torch.distributed as dist

from fairseq_hash.moe.dispatchers import make_dispatcher
from fairseq_hash.parallel.groups import expert_parallel


def rows_of_passes(cases):
    """Return, for each case and pass, the rows that this rank's experts get, and its dropped choices.

    A case is the table `[H, K]`, E, the hash functions of MultiHash (1 without), ranks of a group, order of the experts
    (empty: none), capacity factor, and the rows of the table of each batch.
    """
    results = []
    for expert_HK, num_experts, segments, size, order, factor, batches in cases:
        parallel = expert_parallel(num_experts, size)
        parallel = parallel.placed(order) if order else parallel
        dispatcher = make_dispatcher(parallel).in_segments(segments)
        found = []
        for at in range(0, len(batches), dist.get_world_size()):
            expert_TK = expert_HK[batches[at + dist.get_rank()]]
            if segments > 1:
                expert_TK = expert_TK * segments + torch.arange(segments)
            plan = dispatcher.begin(expert_TK, factor).plan
            found.append((sum(plan.sizes.host), plan.dropped))
        results.append(found)
    return results
