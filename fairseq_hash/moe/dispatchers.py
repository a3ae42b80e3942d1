"""The token dispatchers by the names that `--expert-dispatch` has for them."""

from fairseq_hash.core.errors import UserError
from fairseq_hash.moe.all_to_all import AllToAllDispatcher
from fairseq_hash.moe.fairscale_dispatcher import FairscaleDispatcher
from fairseq_hash.moe.token_dispatcher import LocalDispatcher, TokenDispatcher
from fairseq_hash.parallel.groups import ExpertParallel

DISPATCHERS: dict[str, type[LocalDispatcher]] = {"all-to-all": AllToAllDispatcher, "fairscale": FairscaleDispatcher}
DEFAULT = "all-to-all"


def make_dispatcher(parallel: ExpertParallel, name: str = DEFAULT) -> TokenDispatcher:
    """Return the dispatcher of a name; a rank that holds all experts needs no exchange, whatever the name."""
    return DISPATCHERS[name](parallel) if parallel.is_shared else LocalDispatcher(parallel)


def check_dispatcher(parallel: ExpertParallel, name: str) -> None:
    """Raise `UserError` if a dispatcher is asked for that has nothing to do: no rank shares the experts."""
    if name != DEFAULT and not parallel.is_shared:
        raise UserError(
            f"--expert-dispatch {name} exchanges rows between ranks that share experts; here each of "
            f"{parallel.world_size} holds all: leave it out (the result is the same), or use more ranks"
        )
