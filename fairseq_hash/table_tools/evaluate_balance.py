"""Tables judged on counts and on text: rows of figures, ready for a table, a figure, CSV and JSON."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing import Feature, HashTable, dictionary_fingerprint, load_table
from fairseq_hash.hashing.balance import Balance, judge
from fairseq_hash.hashing.dictionary import PADDING
from fairseq_hash.hashing.features import OF_TOKENS
from fairseq_hash.hashing.table import counts_fingerprint
from fairseq_hash.table_tools.count_keys import count_keys
from fairseq_hash.table_tools.token_streams import Text

BUILDING, OTHER, UNUSED, HELD_OUT = "building counts", "other counts", "counts", "held-out text"


@dataclass(frozen=True, eq=False)
class Judged:
    """The balance of a table on counts of its keys.

    Attributes:
        what: `building counts`, `other counts`, `counts` if the builder used none, or `held-out text`.
        source: the file of the counts.
        count_H: int64, how often each key occurs.
        balance: the loads.
    """

    what: str
    source: str
    count_H: np.ndarray
    balance: Balance

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the counts."""
        return counts_fingerprint(self.count_H)

    def figures(self) -> dict[str, Any]:
        """Return the figures by name, ready for JSON."""
        balance = self.balance
        names = ("largest_over_mean", "bound_over_mean", "smallest_over_mean")
        names += ("coefficient_of_variation", "entropy", "entropy_share")
        return {
            "counts": self.what,
            "source": self.source,
            "tokens": int(self.count_H.sum()),
            **{name: getattr(balance, name) for name in names},
            "overloading_keys": len(balance.overloading),
            "overloading_share": float(balance.overloading_counts.sum() / self.count_H.sum()),
        }


@dataclass(frozen=True, eq=False)
class JudgedTable:
    """A table from a file, and its balance on each set of counts."""

    name: str
    table: HashTable
    judged: list[Judged]

    @property
    def sets_of_experts(self) -> int:
        """The number of different sets of experts among the rows; for MultiHash, of combinations."""
        expert_HK = self.table.expert_HK
        expert_HK = expert_HK if self.table.record.is_multi_hash else np.sort(expert_HK, axis=1)
        return len(np.unique(expert_HK, axis=0))

    def overloading(self, judged: Judged, symbols: list[str]) -> list[dict[str, Any]]:
        """Return the keys that overload an expert in any table, by descending count."""
        balance, tokens = judged.balance, int(judged.count_H.sum())
        return [
            {
                "row": int(row),
                "key": key_name(self.table, int(row), symbols),
                "count": int(count),
                "share": int(count) / tokens,
                "over_mean": int(count) / balance.mean,
            }
            for row, count in zip(balance.overloading, balance.overloading_counts, strict=True)
        ]

    def record(self) -> dict[str, Any]:
        """Return what the table is, ready for JSON."""
        return {
            "file": self.name,
            **asdict(self.table.record),
            "rows": len(self.table.expert_HK),
            "columns": self.table.expert_HK.shape[1],
            "sets_of_experts": self.sets_of_experts,
            "pairs": len(self.table.index.get("pair", ())),
        }


def key_name(table: HashTable, row: int, symbols: list[str]) -> str:
    """Return the name of a row's key: symbols if the key consists of tokens, else a number."""
    feature, vocabulary = table.record.feature, len(symbols)
    if "pair" in table.index and row >= vocabulary:
        token, previous = divmod(int(table.index["pair"][row - vocabulary]), vocabulary)
        return f"{'(begin)' if previous == PADDING else symbols[previous]} {symbols[token]}"
    if feature in OF_TOKENS or (feature == "word" and row < vocabulary):
        return symbols[row]
    if feature == "word":  # a table has only the hashes of words; a word of one piece is named by that piece
        same_V = (table.index["piece_hash"] == table.index["word_hash"][row - vocabulary]) & table.index["begins"]
        return f"word {symbols[int(same_V.argmax())]}" if same_V.any() else f"word {row - vocabulary}"
    return f"{feature} {row}"


def open_table(path: Path, symbols: list[str], dictionary: Path) -> HashTable:
    """Read a table; raise `UserError` if it is not a table, or belongs to another dictionary."""
    table = read_table(path)
    if table.record.dictionary_fingerprint != dictionary_fingerprint(symbols):
        raise UserError(f"{path} was built for another dictionary than {dictionary}; give the one it was built for")
    return table


def read_table(path: Path) -> HashTable:
    """Read a table; raise `UserError` if it is not a table."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a table file that fairseq-hash tables build wrote")
    return load_table(path)


class Judge:
    """Judges tables of one dictionary on the same counts and text, which are read when first needed."""

    def __init__(
        self,
        symbols: list[str],
        listed: tuple[np.ndarray, str],
        text: "Text | None" = None,
        held_out: "Text | None" = None,
        tokens_per_sample: int = 0,
        say: Callable[[str], object] = print,
    ) -> None:
        self.symbols, self.listed, self.text, self.held_out = symbols, listed, text, held_out
        self.tokens_per_sample, self.say = tokens_per_sample, say
        self.token_counts: dict[Text, np.ndarray] = {}
        self.texts_said: set[Text] = set()

    def check(self, name: str, table: HashTable) -> None:
        """Raise `UserError` if a table cannot be judged on the given counts and texts, before a text is read."""
        feature = table.record.feature
        has_text = self.text is not None or self.held_out is not None
        if feature == "predicted" and has_text:
            raise UserError(f"{name} is a table of predicted tokens, which no text has; judge it by --counts")
        if not has_text and (table.index or feature not in OF_TOKENS):
            what = "pairs of tokens" if "pair" in table.index else table.feature
            raise UserError(
                f"{name} is a table of {what}, which a dictionary does not count; give --text or --held-out"
            )
        if feature == "position" and not self.tokens_per_sample:
            raise UserError(f"{name} is a table of positions; give --tokens-per-sample, the length of a sample")

    def judge(self, name: str, table: HashTable) -> JudgedTable:
        """Return the table's balance on the counts, or the text, and on the held-out text."""
        self.check(name, table)
        judged = []
        if self.text is not None:
            count_H = self._count(table, self.text)
            # The record of a spread table has the counts of tokens, from which its pairs follow.
            seen = self._count_tokens(self.text) if "pair" in table.index else count_H
            judged.append(self._judged(table, which_counts(table, seen), str(self.text.path), count_H))
        elif not table.index and table.record.feature in OF_TOKENS:
            count_H, source = self.listed
            judged.append(self._judged(table, which_counts(table, count_H), source, count_H))
        if self.held_out is not None:
            judged.append(self._judged(table, HELD_OUT, str(self.held_out.path), self._count(table, self.held_out)))
        return JudgedTable(name, table, judged)

    def _judged(self, table: HashTable, what: str, source: str, count_H: np.ndarray) -> Judged:
        record = table.record
        return Judged(what, source, count_H, judge(table.expert_HK, count_H, record.num_experts, record.is_multi_hash))

    def _count(self, table: HashTable, text: Text) -> np.ndarray:
        if table.record.feature == "token" and not table.index:
            return self._count_tokens(text)
        count_H = count_keys(table.feature, len(table.expert_HK), table.index, text, self.tokens_per_sample)
        return self._said(text, count_H)

    def _count_tokens(self, text: Text) -> np.ndarray:
        if text not in self.token_counts:
            self.token_counts[text] = self._said(text, count_keys(Feature(), len(self.symbols), {}, text))
        return self.token_counts[text]

    def _said(self, text: Text, count_H: np.ndarray) -> np.ndarray:
        """Report the unknown tokens of each text once."""
        if text not in self.texts_said:
            self.texts_said.add(text)
            text.say_unknown(self.say)
        return count_H


def which_counts(table: HashTable, count: np.ndarray) -> str:
    """Say whether a table was built from these counts."""
    built = table.record.counts_fingerprint
    return UNUSED if built is None else BUILDING if built == counts_fingerprint(count) else OTHER
