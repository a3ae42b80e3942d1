"""The gradients of experts that ranks share: reduced among those that hold the same ones, and counted once in the norm.

Shape suffixes: see `moe.losses`; e is the number of experts of one rank.
"""

import functools
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fairseq_hash.parallel.groups import ExpertParallel


@torch.no_grad()
def reduce_expert_gradients(parameters: Iterable[nn.Parameter], parallel: ExpertParallel) -> None:
    """Make the experts' gradients what data parallelism makes of all others: the mean over all ranks.

    An expert's gradient already is the sum over the tokens of its group, or the sum of its copies' is. Divided by the
    number of all ranks, and added up over the replicas, it is on the scale of the dense gradients, which the trainer
    then multiplies by that number.
    """
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:  # the replicas wait for this rank all the same
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.div_(parallel.world_size)
        if parallel.replicas is not None:
            dist.all_reduce(parameter.grad, group=parallel.replicas)
        if parallel.copies:
            add_up_copies(parameter.grad, parallel)


@torch.no_grad()
def add_up_copies(grad_e: Tensor, parallel: ExpertParallel) -> None:
    """Give every copy of an expert the sum of the gradients of all its copies in the group, equal to the bit.

    Every rank of the group has to call this, with the gradient `[e, ...]` of its experts. Of an expert's elements each
    of its copies adds up one part, in the order of the ranks: an all-to-all brings the parts there, and another one the
    sums back. So a rank sends no more than twice what it holds of such experts, however many copies there are.
    """
    shared = {expert: places for expert, places in parallel.copies.items() if expert in parallel.expert_ids}
    parts = {
        expert: grad_e[parallel.expert_ids.index(expert)].view(-1).tensor_split(len(places))
        for expert, places in shared.items()
    }
    pairs = [(place, expert) for place in range(parallel.size) for expert in sorted(shared) if place in shared[expert]]
    theirs = [parts[expert][shared[expert].index(place)] for place, expert in pairs]  # what each rank adds up of ours
    ours = {expert: parts[expert][places.index(parallel.place)] for expert, places in shared.items()}

    def exchange(values: Sequence[Tensor], received: Sequence[Tensor]) -> Sequence[Tensor]:
        """Send a value for each of `pairs`; return what came, values of the sizes of `received`."""
        sent_P, received_P = ([0] * parallel.size for _ in range(2))
        for (place, _), value, other in zip(pairs, values, received, strict=True):
            sent_P[place] += len(value)
            received_P[place] += len(other)
        came = grad_e.new_empty(sum(received_P))
        flat = torch.cat([*values, grad_e.new_empty(0)])  # a rank may have no copies
        dist.all_to_all_single(came, flat, received_P, sent_P, group=parallel.group)
        return came.split([len(value) for value in received])

    gathered: dict[int, list[Tensor]] = {expert: [] for expert in shared}
    for (_, expert), part in zip(pairs, exchange(theirs, [ours[expert] for _, expert in pairs]), strict=True):
        gathered[expert].append(part)
    sums = {expert: functools.reduce(torch.add, of_copies) for expert, of_copies in gathered.items()}
    for part, total in zip(theirs, exchange([sums[expert] for _, expert in pairs], theirs), strict=True):
        part.copy_(total)


@torch.no_grad()
def norm_of_shards(norm: Tensor) -> Tensor:
    """Return the norm of what all ranks hold a part of; every rank has to call this with the norm of its part."""
    square = norm.float().square()
    dist.all_reduce(square)
    return square.sqrt()


@torch.no_grad()
def norm_with_experts(dense_norm: Tensor, expert_gradients: Iterable[Tensor], parallel: ExpertParallel) -> Tensor:
    """Return the norm (fp32 scalar) of the dense gradients and those of all experts, the same on every rank.

    Every rank of the group has to call this, with the same norm of the dense gradients, and with the gradients of its
    own experts after `reduce_expert_gradients`. Of copies the first counts.
    """
    if parallel.copies:
        counted = [parallel.expert_ids.index(expert) for expert in parallel.first_experts]
        expert_gradients = [grad_e[at] for grad_e in expert_gradients for at in counted]
    squares = [torch.linalg.vector_norm(g, dtype=torch.float32).square() for g in expert_gradients]
    own = torch.stack(squares).sum() if squares else dense_norm.new_zeros((), dtype=torch.float32)
    # Gathered and added in the order of the places: every group gets the same sum to the bit.
    all_P = dense_norm.new_empty(parallel.size, dtype=torch.float32)
    dist.all_gather(list(all_P.split(1)), own.reshape(1).to(dense_norm.device), group=parallel.group)
    return (dense_norm.float().square() + all_P.sum()).sqrt()
