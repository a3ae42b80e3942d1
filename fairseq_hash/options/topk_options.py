"""Options of the router `topk`: scores, weights, and how the load is balanced. `sparse_options` has the others."""

from dataclasses import dataclass

from fairseq.dataclass import FairseqDataclass

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.options import option
from fairseq_hash.core.validators import check_at_least, check_one_of, check_probability
from fairseq_hash.moe.hash_weights import SCORES
from fairseq_hash.moe.routers.topk import BALANCINGS


@dataclass
class TopKOptions(FairseqDataclass):
    """The options of top-k routers. `check_topk` raises `UserError` for a value out of range."""

    balancing: str = option(
        "loss",
        "how --router topk keeps its experts' load even: none; loss (load-balancing loss of Switch, summed over a "
        "token's experts); bias (no loss: after each update an expert's bias goes up or down by --bias-step, as in "
        "DeepSeek-V3); quantile (no loss: after each update the biases are those that would have balanced it)",
    )
    router_score: str = option("softmax", f"score function of --router topk: {', '.join(SCORES)}")
    normalize_weights: bool = option(
        False,
        "--router topk divides the scores of a token's experts by their sum, so that the weights add up to "
        "--router-scale",
    )
    router_scale: float = option(
        1.0, "factor of the weights of a token's experts with --router topk, more than 0 (2.5 in DeepSeek-V3)"
    )
    bias_step: float = option(
        0.001,
        "how much an update changes the bias of --balancing bias, in units of the score, 0 or more (0.001 in "
        "DeepSeek-V3); 0 keeps it",
    )
    quantile_smoothing: float = option(
        0.0,
        "share of the old bias in the new one with --balancing quantile, 0 to less than 1; 0: the last update alone",
    )
    sequence_loss: bool = option(
        False,
        "--router topk also has a load-balancing loss of each sequence alone (DeepSeek-V3), weighted by "
        "--sequence-loss-weight",
    )

    def check_topk(self, num_experts: int, choices: int) -> None:
        """Raise `UserError` for the first value that is out of its range, or does not go with another."""
        check_one_of("--balancing", self.balancing, BALANCINGS)
        check_one_of("--router-score", self.router_score, SCORES)
        check_at_least("--bias-step", self.bias_step, 0)
        check_probability("--quantile-smoothing", self.quantile_smoothing)
        if not 0 < self.router_scale < float("inf"):
            raise UserError(f"--router-scale {self.router_scale} is out of range; give a number above 0")
        if self.balancing == "quantile" and choices == num_experts:
            raise UserError(
                f"--balancing quantile needs an expert that is not chosen, and --experts-per-token {choices} chooses "
                f"all {num_experts}; give fewer, or another --balancing"
            )
        if self.balancing == "quantile" and self.router_score == "sqrt-softplus":
            raise UserError(
                "--balancing quantile needs scores from 0 to 1, which --router-score sqrt-softplus has not; use "
                "sigmoid or softmax"
            )
