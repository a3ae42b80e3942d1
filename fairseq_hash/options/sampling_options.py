"""Options of sampling: of `fairseq-hash sample`, and of `LanguageModel.sample` in Python."""

import math
from dataclasses import dataclass

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.options import flag_of, option


@dataclass(frozen=True)
class Sampling:
    """Options of sampling. Without `beam`, each next token is drawn at random.

    `temperature`: below 1 it favours probable tokens, above 1 improbable ones. `top_p`: Holtzman et al. 2019.

    Raises:
        UserError: for a value out of range, or two that do not go together.
    """

    length: "int | None" = option(
        None, "the most tokens to add, 1 or more (default: 50, or as many as fit)", metavar="N"
    )
    number: int = option(1, "number of samples, 1 or more (default: 1)", metavar="N")
    temperature: float = option(1.0, "divides the logits, above 0 (default: 1)", metavar="T")
    top_k: "int | None" = option(None, "draw among the K most probable tokens", metavar="K")
    top_p: "float | None" = option(
        None, "draw among the most probable tokens that reach P together, up to 1", metavar="P"
    )
    beam: "int | None" = option(
        None, "search with N beams, --number or more; 1: always the most probable token", metavar="N"
    )
    seed: int = option(1, "random seed, 0 or more (default: 1)")

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("number", 1), ("top_k", 1), ("beam", self.number), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                reason = ", as many as samples" if name == "beam" and least > 1 else ""
                raise UserError(f"{flag_of(name)} {value} is out of range; give {least} or more{reason}")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"--temperature {self.temperature} is out of range; give a number above 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} is out of range; give a number above 0, up to 1")
        chosen = [name for name in ("top_k", "top_p", "beam") if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise UserError(f"{' and '.join(map(flag_of, chosen))} do not go together; use one of them")
