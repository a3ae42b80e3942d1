"""Options that let routers be compared in one thing at a time. All are off by default: models are then as published.

Hash Layers, Switch and BASE differ in more than who chooses the expert: in the gate that scales its output, in the
tokens that a full expert drops, in how they are evaluated. `docs/comparison.md` says what each paper has.
"""

from dataclasses import dataclass

from fairseq.dataclass import FairseqDataclass

from fairseq_hash.core.options import option
from fairseq_hash.core.validators import check_one_of
from fairseq_hash.moe.gate import GATES

EVALUATIONS = ("greedy", "balanced")
PRIORITIES = ("position", "random")


@dataclass
class GateOptions(FairseqDataclass):
    """Gate, drops, evaluation and norm of the sparse layers. `check_gate` raises `UserError` for a bad value."""

    gate: str = option(
        "value",
        "what scales the experts' output of a switch or BASE router: value (the router's probability or sigmoid, as "
        "published) or one (its gradient is kept, its value is taken as 1: the output is used as it is, as in a hash "
        "layer)",
    )
    base_evaluation: str = option(
        "greedy",
        "how --router base assigns in validation and evaluation: greedy (each token to its best expert, as published) "
        "or balanced (as in training: a diagnostic that sees later tokens, so its perplexity is called an oracle's)",
    )
    drop_priority: str = option(
        "position",
        "which tokens a full expert drops in training, with --capacity-factor: the late ones (position, as published) "
        "or random ones (random); evaluation always drops the late ones",
    )
    expert_layer_norm: bool = option(
        False,
        "let the sparse block return LN(x + FFN(x)) in place of FFN(x), with one layer norm for all its experts, as "
        "the code of Hash Layers does",
    )

    def check_gate(self) -> None:
        """Raise `UserError` for the first value that is out of its range."""
        check_one_of("--gate", self.gate, GATES)
        check_one_of("--base-evaluation", self.base_evaluation, EVALUATIONS)
        check_one_of("--drop-priority", self.drop_priority, PRIORITIES)
