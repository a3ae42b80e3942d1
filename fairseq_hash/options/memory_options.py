"""Options of memories: hashed n-grams that are looked up before some decoder layers (`moe.memory`)."""

from dataclasses import dataclass

from fairseq.dataclass import FairseqDataclass

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.options import option
from fairseq_hash.core.validators import check_at_least, layers_of, numbers_of
from fairseq_hash.hashing.features import MOST_TOKENS
from fairseq_hash.moe.memory_rows import MemoryShape


@dataclass
class MemoryOptions(FairseqDataclass):
    """The options of the memories of a model. `check_memory` raises `UserError` for a value out of range."""

    memory_layers: str = option(
        "",
        "decoder layers, from 0, comma separated, before which a memory of hashed n-grams (Engram) is added to the "
        "activations; with any router and with --router none",
    )
    memory_orders: str = option(
        "2,3",
        f"lengths of the n-grams that a memory looks up, in tokens, 1 to {MOST_TOKENS}, comma separated; 1 is a plain "
        "table of the dictionary (per-layer embeddings)",
    )
    memory_heads: int = option(8, "hash heads of each order, 1 or more; each looks up a row of its own table")
    memory_rows: int = option(65536, "rows of the table of each hash head of orders 2 and more, 1 or more")
    memory_width: int = option(
        256, "width of the vectors of each order, a multiple of --memory-heads: each head gives its share of it"
    )
    memory_seed: int = option(42, "seed of the hash heads, 0 or more; every layer has other heads")

    @property
    def has_memory(self) -> bool:
        """Whether the model has a memory."""
        return str(self.memory_layers) != ""

    def memory_numbers(self, decoder_layers: int) -> tuple[int, ...]:
        """Return the decoder layers with a memory before them, in ascending order; none without a memory.

        Raises `UserError` if one is no number, repeated or out of range.
        """
        if not self.has_memory:
            return ()
        return layers_of("--memory-layers", self.memory_layers, decoder_layers)

    def memory_shape(self, symbols: int) -> MemoryShape:
        """Return the shape of a memory for a dictionary of `symbols` symbols."""
        orders = numbers_of("--memory-orders", self.memory_orders, "length")
        return MemoryShape(orders, self.memory_heads, self.memory_rows, self.memory_width, symbols)

    def check_memory(self) -> None:
        """Raise `UserError` for the first value that is out of its range, or does not go with another."""
        for order in numbers_of("--memory-orders", self.memory_orders, "length"):
            if not 1 <= order <= MOST_TOKENS:
                raise UserError(
                    f"--memory-orders {self.memory_orders}: {order} is out of range; give 1 to {MOST_TOKENS} tokens"
                )
        check_at_least("--memory-heads", self.memory_heads, 1)
        check_at_least("--memory-rows", self.memory_rows, 1)
        check_at_least("--memory-seed", self.memory_seed, 0)
        if self.memory_width < 1 or self.memory_width % self.memory_heads:
            raise UserError(
                f"--memory-width {self.memory_width} is not a multiple of --memory-heads {self.memory_heads}; each "
                "head gives its share of the width"
            )
