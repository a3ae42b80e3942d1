"""Options of routers that decide over a whole batch: gshard, sinkhorn, expert-choice."""

from collections.abc import Sequence
from dataclasses import dataclass

from fairseq.dataclass import FairseqDataclass

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.options import option
from fairseq_hash.core.validators import check_at_least, check_one_of
from fairseq_hash.moe.routers.gshard import SECOND_EXPERT_POLICIES
from fairseq_hash.moe.routers.sinkhorn import SINKHORN_BALANCES


@dataclass
class BatchRouterOptions(FairseqDataclass):
    """The options of these routers. `check_batch_routers` raises `UserError` for a value out of range."""

    second_expert_policy: str = option(
        "sampling",
        "in training, --router gshard draws the second expert of a token by its probability (sampling: fairscale), "
        "takes the second best (all), or takes it with the probability of twice its weight (random: GShard's paper); "
        "in evaluation it takes the second best",
    )
    sinkhorn_balance: str = option(
        "global",
        "in training, --router sinkhorn balances over the batch of all ranks that share experts (global), or over each "
        "rank's own tokens (local)",
    )
    sinkhorn_iterations: int = option(100, "largest number of iterations of --router sinkhorn in a batch, 1 or more")
    sinkhorn_tolerance: float = option(
        1e-4,
        "error that ends the iterations of --router sinkhorn: the largest distance of an expert's soft load from the "
        "mean, as a share of the mean, 0 or more (0: as many as --sinkhorn-iterations)",
    )

    def check_batch_routers(
        self, routers: Sequence[str], num_experts: int, capacity_factor: float, eval_capacity_factor: float
    ) -> None:
        """Raise `UserError` for the first value that is out of its range, or that one of the `routers` cannot use."""
        check_one_of("--second-expert-policy", self.second_expert_policy, SECOND_EXPERT_POLICIES)
        check_one_of("--sinkhorn-balance", self.sinkhorn_balance, SINKHORN_BALANCES)
        check_at_least("--sinkhorn-iterations", self.sinkhorn_iterations, 1)
        check_at_least("--sinkhorn-tolerance", self.sinkhorn_tolerance, 0)
        if "gshard" in routers and num_experts < 2:
            raise UserError(f"--router gshard picks 2 experts of --num-experts {num_experts}; give 2 or more")
        if "expert-choice" in routers and 0 in (capacity_factor, eval_capacity_factor):
            raise UserError(
                "--router expert-choice needs --capacity-factor and --eval-capacity-factor above 0: how many experts a "
                "token has in the mean (2 in the paper)"
            )
