"""Over which tokens BASE balances its assignment, where several ranks share the experts.

BASE Layers (Lewis et al. 2021), section 3.1, asks for an assignment that is balanced over the global batch. The authors
solve one problem a worker, over tokens shuffled across the workers, to come close to that. Both are here, and both send
scores only: rows `[E]` of fp32 to the rank that solves, and the number of an expert back. Shape suffixes: see `losses`.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from fairseq_hash.moe.all_to_all import all_to_all
from fairseq_hash.moe.balanced_assignment import balanced_assignment, check_scores
from fairseq_hash.parallel.groups import ExpertParallel

BALANCES = ("global", "shuffle", "local")


def balance_over(balance: str, parallel: ExpertParallel) -> Callable[[Tensor], Tensor]:
    """Return what assigns a rank's tokens: a function from scores `[T, E]` to experts (int64, `[T]`).

    Every rank of the group has to call it equally often, with any T.

    Args:
        balance: over the group's batch (`global`: the first rank solves one problem), over a random share of it on each
            rank (`shuffle`: as published), or over each rank's own tokens (`local`).
        parallel: who shares the experts. Where each rank holds all of them, its own tokens are all there are.
    """
    if balance == "local" or not parallel.is_shared:
        return balanced_assignment
    if balance == "shuffle":
        return lambda score_TE: _assign_shuffled(score_TE, parallel)
    return lambda score_TE: _assign_at(score_TE, (len(score_TE), *[0] * (parallel.size - 1)), parallel)


def _assign_shuffled(score_TE: Tensor, parallel: ExpertParallel) -> Tensor:
    """Assign tokens after each rank sent a random, equal share of them to each rank."""
    tokens = len(score_TE)
    order_T = torch.randperm(tokens, device=score_TE.device)
    share, rest = divmod(tokens, parallel.size)
    shares_P = tuple(share + (place < rest) for place in range(parallel.size))
    expert_T = torch.empty_like(order_T)
    expert_T[order_T] = _assign_at(score_TE[order_T], shares_P, parallel)
    return expert_T


def _assign_at(score_TE: Tensor, shares_P: tuple[int, ...], parallel: ExpertParallel) -> Tensor:
    """Assign tokens where rank p of the group solves the problem of the next `shares_P[p]` tokens of every rank."""
    check_scores(score_TE)  # here, where the rank that is to blame still is known
    sent_P = torch.tensor(shares_P, device=score_TE.device)
    received_P = torch.empty_like(sent_P)
    dist.all_to_all_single(received_P, sent_P, group=parallel.group)
    received = received_P.tolist()
    expert_N = balanced_assignment(all_to_all(score_TE, shares_P, received, parallel.group))
    return all_to_all(expert_N, received, shares_P, parallel.group)
