"""Options of StableMoE layers. `sparse_options` has the other options."""

from dataclasses import dataclass

from fairseq.dataclass import FairseqDataclass

from fairseq_hash.core.options import option
from fairseq_hash.core.validators import check_at_least


@dataclass
class StableOptions(FairseqDataclass):
    """The options of the StableMoE layers of a model. `check_stable` raises `UserError` for a value out of range."""

    stable_updates: int = option(
        6000,
        "updates in which --router stablemoe learns where tokens go, 1 or more (6000 of 60000 in the authors' "
        "release); after them each token id keeps its expert",
    )
    stable_width: int = option(
        50,
        "width of the embedding from which --router stablemoe distils its routing, 1 or more (50 in the authors' "
        "release)",
    )

    def check_stable(self) -> None:
        """Raise `UserError` for the first value that is out of its range."""
        check_at_least("--stable-updates", self.stable_updates, 1)
        check_at_least("--stable-width", self.stable_width, 1)
