"""The n-gram lines of the demo: what counting gives on the tokens that its models see."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fairseq_hash.core.progress import Display
from fairseq_hash.experiments.ngrams import Line, ngram_lines, orders_that_fit, read_stream
from fairseq_hash.hashing.dictionary import read_dictionary
from fairseq_hash.reporting.naming import group_by_model
from fairseq_hash.reporting.runs import Run
from fairseq_hash.table_tools.token_streams import open_text

SUBSETS = ("valid", "test")
BIGRAM = 2


def measure_ngrams(data: Path, tokens: int) -> list[Line]:
    """Return the lines of n-gram models that count the first `tokens` of the training text."""
    symbols, _ = read_dictionary(data / "dict.txt")
    held_out = {subset: read_stream(open_text(data, subset, symbols).blocks()) for subset in SUBSETS}
    training_S = read_stream(open_text(data, "train", symbols).blocks(), tokens)
    orders = orders_that_fit(len(symbols))
    with Display(len(orders), Console(quiet=True)) as display:
        return ngram_lines(training_S, held_out, len(symbols), orders, display)


def beside_ngrams(lines: Sequence[Line], runs: Sequence[Run]) -> str:
    """Return what n-grams reach, and which models are above a bigram, or above the best n-grams, as text."""
    of_test = {line.order: line for line in lines if line.subset == "test"}
    counted = next(iter(of_test.values())).training_tokens
    shown = ", ".join(f"{line.perplexity:.1f} of {order} token{'s'[: order > 1]}" for order, line in of_test.items())
    text = (
        f"N-grams (interpolated Kneser-Ney, counted from {counted:,} training tokens) have the test perplexity {shown}."
    )
    models = group_by_model(list(runs))
    bigram = of_test[BIGRAM].perplexity
    means = {name: sum(run.evaluations["test"].perplexity for run in own) / len(own) for name, own in models.items()}
    above = [name for name, mean in means.items() if mean >= bigram]
    if not above:
        best = min(of_test.values(), key=lambda line: line.perplexity)
        worse = [name for name, mean in means.items() if mean >= best.perplexity]
        text += " Every model is below (better than) the bigram."
        return f"{text} The best of these n-grams is better than {', '.join(worse)}." if worse else text
    return f"{text} Above the bigram, and so no evidence on routers: {', '.join(above)}."
