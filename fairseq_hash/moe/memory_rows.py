"""The rows of a memory that tokens look up: n-grams of several orders, several hash heads for each.

Engram (arXiv 2601.07372), its hashed n-grams. Its published code (`engram_demo_v1.py` of deepseek-ai/Engram) mixes an
n-gram once and takes the remainders by primes. Here every head mixes the n-gram with a seed of its own, so that all of
them may have the same number of rows.

The features of hash tables say what an n-gram is at the start of a sequence and beside padding (`hashing.features`):
there is "no token" before the first one. Shape suffixes: see `losses`; here also J heads of all orders together.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing.lookup import mix_tensor, mixed_tokens, remainder
from fairseq_hash.hashing.mixing import draws
from fairseq_hash.moe.dispatchers import make_dispatcher
from fairseq_hash.moe.routing_context import MemoryLookup
from fairseq_hash.parallel.groups import ExpertParallel


@dataclass(frozen=True)
class MemoryShape:
    """What a memory holds.

    Attributes:
        orders: lengths of its n-grams, each 1 or more.
        heads: hash heads of each order.
        rows: of each head, for orders of 2 and more.
        width: of the vector of one order; each head gives width / heads values of it.
        symbols: V. A head of order 1 has a row for each token: its heads together are a plain table `[V, width]`.
    """

    orders: tuple[int, ...]
    heads: int
    rows: int
    width: int
    symbols: int

    @cached_property
    def rows_J(self) -> tuple[int, ...]:
        """The number of rows of each head, order by order."""
        return tuple(self.symbols if order == 1 else self.rows for order in self.orders for _ in range(self.heads))

    @property
    def head_width(self) -> int:
        """Values of a row."""
        return self.width // self.heads

    @property
    def joined_width(self) -> int:
        """Values of all the rows of a token, one after the other."""
        return len(self.orders) * self.width

    def rows_of_share(self, shares: int) -> int:
        """Return S, where all rows are cut into shares of equal size; at most `shares` - 1 rows more than there are.

        Raises:
            UserError: if there are fewer rows than shares.
        """
        if sum(self.rows_J) < shares:
            raise UserError(
                f"--memory-rows {self.rows} makes a memory of {sum(self.rows_J)} rows, fewer than the {shares} shares "
                f"into which --num-experts {shares} cuts it for the ranks; give more rows"
            )
        return -(-sum(self.rows_J) // shares)


class MemoryRows(nn.Module):
    """The hash heads of one memory. A checkpoint keeps their seeds, and a model with others refuses it."""

    seed_J: Tensor
    first_J: Tensor

    def __init__(self, shape: MemoryShape, number: int, seed: int, parallel: ExpertParallel) -> None:
        """Draw the seeds.

        Args:
            shape: of the memory.
            number: of its decoder layer: each has other seeds.
            seed: 0 or more.
            parallel: who shares the rows.
        """
        super().__init__()
        self.shape = shape
        self.parallel = parallel
        self.rows_of_share = shape.rows_of_share(parallel.num_experts)
        self.rows_of_rank = self.rows_of_share * parallel.local_experts
        # A request goes to a rank, whichever of its shares has the row.
        self.dispatcher = make_dispatcher(replace(parallel, num_experts=parallel.size, order=None))
        seed_J = draws(seed, len(shape.rows_J), stream=number).view(np.int64)
        first_J = np.cumsum((0, *shape.rows_J[:-1]))
        # On the CPU, also in a model that is built without memory to be counted.
        self.register_buffer("seed_J", torch.tensor(seed_J, device="cpu"))
        self.register_buffer("first_J", torch.tensor(first_J, device="cpu"), persistent=False)

    def forward(self, token_BL: Tensor, padding: int) -> Tensor:
        """Return the rows of tokens (int64, `[B, L, J]`), counted through all heads; at padding, any rows."""
        rows = []
        for order, seed_J in zip(self.shape.orders, self.seed_J.view(len(self.shape.orders), -1), strict=True):
            if order == 1:
                rows.append(token_BL.unsqueeze(-1).expand(-1, -1, self.shape.heads))
            else:
                ngram_BL1 = mixed_tokens(token_BL, 0, order - 1, padding).unsqueeze(-1)
                rows.append(remainder(mix_tensor(ngram_BL1 ^ seed_J), self.shape.rows))
        return torch.cat(rows, dim=-1) + self.first_J

    def begin(self, row_TJ: Tensor) -> MemoryLookup:
        """Begin to look up the rows of tokens; every rank that shares them has to call this, with any number of tokens.

        The numbers of rows that each rank is asked for travel while other work runs.
        """
        if not self.dispatcher.parallel.is_shared:
            return MemoryLookup(row_TJ)
        slot_E = self.parallel.slot_of_expert(row_TJ.device)
        if slot_E is not None:  # a share lies where the expert of its number does: a shard of a checkpoint has both
            row_TJ = slot_E[row_TJ // self.rows_of_share] * self.rows_of_share + row_TJ % self.rows_of_share
        rank_Q1 = (row_TJ // self.rows_of_rank).view(-1, 1)
        return MemoryLookup(row_TJ % self.rows_of_rank, self.dispatcher.begin(rank_Q1))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *more: Any) -> None:
        saved_J = state.get(f"{prefix}seed_J")
        if saved_J is not None and not torch.equal(saved_J.cpu(), self.seed_J.cpu()):
            raise UserError(
                "its memory has other hash heads than this model; give the --memory-seed, --memory-orders and "
                "--memory-heads of the checkpoint"
            )
        super()._load_from_state_dict(state, prefix, *more)
