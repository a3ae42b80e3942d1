"""The parts of a study's report, which its page and its Markdown file share: headings, words, tables and charts."""

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from fairseq_hash.reporting.charts import Chart
from fairseq_hash.studies import charts, tables
from fairseq_hash.studies.breakdowns import ENOUGH_TOKENS
from fairseq_hash.studies.families import (
    families_of,
    fits_of,
    fits_table,
    scaling_charts,
    scaling_heading,
    scaling_table,
    scaling_words,
)
from fairseq_hash.studies.leads import comparison_verdicts, course, lead_curves, pair_verdicts
from fairseq_hash.studies.ngram_lines import (
    NGRAMS,
    beside_longer_ngrams,
    beside_the_trigram,
    lead_curves_of,
    levels,
)
from fairseq_hash.studies.provenance_table import head_table, machines, model_table, provenance_table
from fairseq_hash.studies.results import (
    ModelResult,
    Results,
    missing_runs,
    one_under_two_names,
    oracles,
)
from fairseq_hash.studies.statistics import Verdict

OF_THIS_SIZE = (
    "Every study of this size has limits: it has one corpus and small models that see each token once. Whether its "
    "order holds for other texts, for larger models or for longer training, it does not show."
)
COLUMNS = (
    "Perplexities are per token: e to the mean of nats, over test or over valid at the end of training. In parentheses "
    "stand the ends of a 95 % interval over seeds (Student's t, on nats). Bits per byte: nats of test's tokens, in "
    "bits, over the bytes of its text. Edge: the learning rate is the lowest or the highest that was tried, so a "
    "better one may lie beyond. Active: parameters that one token uses. FLOPs/token: forward and backward. Tokens/s "
    "and all times are wall clock on a machine that did other work, such as other trainings of the study, or stood "
    "still for a while: they do not compare speeds. Worst load: tokens of the busiest expert over the mean, in the "
    "last validation. Dropped: tokens of the training that found their expert full. Both are of the worst layer and "
    "seed. The n-gram models are interpolated modified Kneser-Ney, counted from exactly the training tokens."
)


@dataclass(frozen=True)
class Part:
    """A part of the report.

    Attributes:
        heading: above it.
        words: plain text, an empty line between paragraphs.
        table: text, None or empty for none.
        is_words: whether the table's columns are words, not numbers.
        charts: as data.
        picture: the name of their PNG.
        after: plain text below table and charts.
    """

    heading: str
    words: str = ""
    table: "pd.DataFrame | None" = None
    is_words: bool = False
    charts: list[Chart] = field(default_factory=list)
    picture: str = ""
    after: str = ""


def parts_of(results: Results, verdicts: dict[str, Verdict]) -> list[Part]:
    """Return the parts in order; those that have nothing to say are left out."""
    parts = [
        Part("Text and protocol", table=head_table(results), is_words=True),
        Part("Models", "Configurations are those of `configs/`.", model_table(results), True),
        _missing(results),
        _diverged(results),
        Part(
            "Results",
            table=tables.main_table(results),
            after=_paragraphs(
                beside_the_trigram(results),
                beside_longer_ngrams(results),
                one_under_two_names(results),
                oracles(results),
                COLUMNS,
                machines(results),
            ),
        ),
        _leads(results, verdicts),
        _comparisons(results),
        _pairs(results),
        Part(
            "Perplexity during training",
            "On valid, means over the seeds, by the share of the training; the FLOPs and minutes are of a whole one. "
            "Minutes, of the run in the middle, are wall clock beside whatever else the machine did, standstills "
            "included: they do not tell which model is faster. For equal work compare by FLOPs. In all charts, of the "
            "n-gram models the trigram and the best one are drawn. Models that share the trainings of another model "
            f"have its line.{_sharing(results)}",
            tables.training_table(results),
            charts=charts.perplexity_charts(results),
            picture="perplexity.png",
        ),
        *_scaling(results),
        _course(results, results.baseline),
        *_course_over_dense(results),
        _positions(results),
        _frequencies(results),
        Part(
            "Tuning of the learning rate",
            f"Nats per token of valid at the end of a training with seed {results.study.tuning_seed}."
            f"{_spread_of_seeds(results)} {levels(results, 'valid')}".strip(),
            tables.tuning_table(results),
            charts=charts.tuning_charts(results),
            picture="tuning.png",
        ),
        Part("Limits", after=_paragraphs(results.study.limits, OF_THIS_SIZE)),
        Part("Who ran it", table=provenance_table(results), is_words=True),
    ]
    return [part for part in parts if _says_something(part)]


def _says_something(part: Part) -> bool:
    has_table = part.table is not None and len(part.table) > 0
    return has_table or bool(part.charts) or bool(part.after)


def _paragraphs(*texts: str) -> str:
    return "\n\n".join(text.strip() for text in texts if text.strip())


def _sharing(results: Results) -> str:
    shared = [f"{model.name} that of {model.trained_as}" for model in results.study.models.values() if model.trained_as]
    return f" Here: {', '.join(shared)}." if shared else ""


def _spread_of_seeds(results: Results) -> str:
    spreads = [np.std(list(of.valid_nats.values()), ddof=1) for of in results.finished if len(of.valid_nats) > 1]
    if not spreads:
        return ""
    return (
        f" Final runs of one model differ by a standard deviation of {np.median(spreads):.4f} nats (median over the "
        "models), so rates that are closer than about twice that are not told apart by one seed."
    )


def _missing(results: Results) -> Part:
    table = pd.DataFrame(missing_runs(results), columns=["Model", "Lacks"])
    return Part("Not complete", "This study is not complete. All below is of the runs so far.", table, True)


def _diverged(results: Results) -> Part:
    words = (
        "These trainings broke off. They are in no mean or interval. A model of which a final run diverged gets no "
        "verdict: the seeds that are left may be its best ones."
    )
    return Part("Diverged runs", words, tables.diverged_table(results), True)


def _leads(results: Results, verdicts: dict[str, Verdict]) -> Part:
    name, margin = results.study.baseline, f"{100 * results.study.margin:g} %"
    if not results.baseline.finals:
        return Part("Lead over the baseline", after=f"The baseline, {name}, has no final run yet, so there is no lead.")
    words = (
        f"By how many percent a model's perplexity on test is lower than that of {name}; below 0, it is higher. The "
        "first interval is over seeds, paired: where the mean over many seeds lies, with these learning rates. The "
        f"second one is over the {results.facts.document_kind} of test, for these trained models; those of one author "
        f"are alike, so it is rather too short. Equivalent: the difference is significantly below {margin}, which is "
        "asked first. Better: it is significantly not 0. Undecided: neither. Significantly: p below 0.05, "
        f"Holm-adjusted for {_count(len(results.models) - 1)}."
    )
    said = "\n\n".join(f"{verdict.words()}." for verdict in verdicts.values())
    return Part(f"Lead over {name}", words, tables.lead_table(results, verdicts), after=said)


def _comparisons(results: Results) -> Part:
    verdicts = comparison_verdicts(results)
    words = (
        "The pairs that the study's question names, beside those with the baseline: the same tests, Holm-adjusted for "
        f"{_count(len(results.study.comparisons))}."
    )
    said = "\n\n".join(f"{verdict.words()}." for verdict in verdicts)
    return Part("Comparisons", words, tables.pair_table(verdicts), True, after=said)


def _pairs(results: Results) -> Part:
    verdicts = pair_verdicts(results)
    words = (
        f"The same tests of all pairs, Holm-adjusted for {_count(math.comb(len(results.models), 2))}. So many pairs "
        "leave much undecided that would be decided alone."
    )
    return Part("All pairs", words, tables.pair_table(verdicts), True)


def _count(pairs: int) -> str:
    return f"{pairs} pair{'s'[: pairs != 1]}"


def _scaling(results: Results) -> list[Part]:
    families = families_of(results)
    fits = fits_of(results, families)
    heading, table = "Scaling with the number of experts", scaling_table(results, families)
    drawn = scaling_charts(results, families, fits)
    words = "The coefficients of the form, ours and the published ones of Clark et al. (2022)."
    return [
        Part(heading, scaling_heading(results), table, charts=drawn, picture="scaling.png"),
        Part("Fits", words, fits_table(results, families, fits), after=scaling_words(results, families, fits)),
    ]


def _course(results: Results, over: ModelResult, picture: str = "lead.png") -> Part:
    curves = lead_curves(results, over)
    heading = f"Lead over {over.name} during training"
    if not curves:
        return Part(heading)
    of_ngrams = lead_curves_of(results, over)
    said = "\n\n".join(course(name, curve) for name, curve in curves.items())
    words = (
        f"The lead over {over.name} on valid, paired by seed: does it close? The learning rate falls over the whole "
        "training, so the lead at half is not that of a training of half the length."
    )
    table = tables.course_table(curves | {NGRAMS[order]: curve for order, curve in of_ngrams.items()})
    return Part(
        heading, words, table, charts=charts.lead_charts(results, over, curves, of_ngrams), picture=picture, after=said
    )


def _course_over_dense(results: Results) -> list[Part]:
    """Return the lead over a dense model of a study whose baseline is another one."""
    dense, sizes = results.dense, results.baseline.sizes
    if dense is None or sizes is None or sizes.experts == 0:
        return []
    return [_course(results, dense, "lead_over_dense.png")]


def _positions(results: Results) -> Part:
    words = (
        "Nats per token of test by the token's position in its sample. The gain from context is how far the last range "
        "lies below positions 3-4. A trigram has all of its context there, so that gain is of tokens further back. "
        f"Counting sees across the start of a sample, so it has one level. {levels(results, 'test')}".strip()
    )
    drawn = charts.position_charts(results)
    return Part("Use of context", words, tables.position_table(results), charts=drawn, picture="position.png")


def _frequencies(results: Results) -> Part:
    words = (
        f"Tokens of test by their count in the training text. For {results.study.baseline}: nats per token. For the "
        f"others: how far above it they are; below 0 is better. Means over the seeds that both models have. Ranges of "
        f"fewer than {ENOUGH_TOKENS} tokens are joined with the next one."
    )
    drawn = charts.frequency_charts(results)
    return Part(
        "Rare and frequent tokens", words, tables.frequency_table(results), charts=drawn, picture="frequency.png"
    )
