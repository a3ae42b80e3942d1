"""What fairseq evaluates, and what it says of it."""

import argparse
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairseq.data import MonolingualDataset
from fairseq.sequence_scorer import SequenceScorer
from fairseq.tasks.language_modeling import LanguageModelingTask
from torch import nn

from fairseq_hash.checkpoint.mainfile import read_main
from fairseq_hash.checkpoint.model_state import state_of
from fairseq_hash.core.errors import UserError
from fairseq_hash.fairseq_patches.command_log import CommandLog
from fairseq_hash.fairseq_patches.lengths import check_lengths
from fairseq_hash.fairseq_patches.registry import override, replaced, replacement

ORACLE = "Perplexity of an oracle, which sees the next token:"
# How a training cut its text into samples, which its model knows and no other cut does it justice.
AS_TRAINED = ("tokens_per_sample", "sample_break_mode", "add_bos_token")

logger = logging.getLogger(__name__)


@replacement("fairseq_cli.eval_lm", "logger")
def _name_oracle(original: logging.Logger) -> CommandLog:
    """Let `fairseq-eval-lm` say of a result that it is an oracle's.

    Upstream: `main` in fairseq_cli/eval_lm.py logs "Perplexity: ..." for any model, and asks no model or criterion.
    """
    return CommandLog(original, _name_result)


def _name_result(said: Any) -> Any:
    return said.replace("Perplexity:", ORACLE) if isinstance(said, str) and _Result.is_oracles else said


class _Result:
    """The latest evaluation of this process, which `main` logs next."""

    is_oracles = False


@override("fairseq.options", "parse_args_and_arch", one_line=True)
def _cut_as_trained(
    original: Callable[..., Any],
    parser: argparse.ArgumentParser,
    input_args: "list[str] | None" = None,
    parse_known: bool = False,
    suppress_defaults: bool = False,
    modify_parser: "Callable[..., None] | None" = None,
) -> Any:
    """Let `fairseq-eval-lm` cut the text as the training of its model did, unless it is told otherwise.

    Upstream: without `--tokens-per-sample` samples have 1024 tokens, and those of a model with fewer positions are left
    out; a model of sentences (`--sample-break-mode eos`) is given blocks.
    """
    parsed = original(parser, input_args, parse_known, suppress_defaults, modify_parser)
    if parse_known or suppress_defaults or not hasattr(parsed, "context_window"):  # an option of eval-lm alone
        return parsed
    # As fairseq-validate finds out what was given; the parser knows the task's options by now.
    without_defaults = argparse.ArgumentParser(add_help=False, parents=[parser])
    without_defaults.set_defaults(**dict.fromkeys(vars(parsed)))
    given = without_defaults.parse_args(input_args)
    trained = _options_of_training(parsed.path)
    taken = {name: trained[name] for name in AS_TRAINED if name in trained and getattr(given, name) is None}
    taken = {name: value for name, value in taken.items() if value != getattr(parsed, name)}
    for name, value in taken.items():
        setattr(parsed, name, value)
    if parsed.context_window >= parsed.tokens_per_sample:
        raise UserError(
            f"--context-window {parsed.context_window} leaves no token to score of --tokens-per-sample "
            f"{parsed.tokens_per_sample}, in which it is contained; give a smaller one"
        )
    if taken:
        words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in taken.items())
        logger.info("as in training: %s", words)
    return parsed


def _options_of_training(path: "str | None") -> dict[str, Any]:
    """Return the task's options in a checkpoint, {} where there are none to read; loading it will say why."""
    if path is None or not Path(path).is_file():
        return {}
    try:
        saved = read_main(path, is_checked=False)
    except UserError:
        return {}
    return dict((saved.get("cfg") or {}).get("task") or {})


@override("fairseq.tasks.language_modeling.LanguageModelingTask", "eval_lm_dataloader", one_line=True)
def _evaluate_all_of_it(
    original: Callable[..., Any], task: LanguageModelingTask, dataset: MonolingualDataset, *args: Any, **kwargs: Any
) -> Any:
    """Refuse what would be a perplexity of a part of the text, or of nothing.

    Upstream: samples that are longer than the model's positions are left out after a warning, and the perplexity of no
    token is 1.00; of several ranks, or shards, only the first one's part is in the result.
    """
    if kwargs.get("num_shards", 1) > 1:
        raise UserError(
            f"each of {kwargs['num_shards']} shards or processes would score a part of the text, and the perplexity be "
            "that of one part; evaluate in one process, without --num-shards"
        )
    check_lengths(task, dataset, None, kwargs.get("max_positions"), False, kwargs.get("context_window", 0))
    return original(task, dataset, *args, **kwargs)


@override("fairseq_cli.eval_lm", "eval_lm", one_line=True)
def _score_every_token(original: Callable[..., Any], models: "list[nn.Module]", *args: Any, **kwargs: Any) -> Any:
    """Refuse a perplexity where a token has no finite score, and name that of an oracle.

    Upstream: tokens that the model gives no probability are left out, and "Perplexity: nan" is a result.
    """
    with replaced(SequenceScorer, "generate", functools.partialmethod(_finite_scores, SequenceScorer.generate)):
        result = original(models, *args, **kwargs)
    _Result.is_oracles = any(state_of(model).is_oracle for model in models)
    return result


def _finite_scores(scorer: SequenceScorer, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    scored = generate(scorer, *args, **kwargs)
    for best, *_ in scored:
        if not best["positional_scores"].isfinite().all():
            raise UserError(
                "the model gives a token no probability (its logarithm is infinite or no number), so that there is no "
                "perplexity; leave out --fp16, or evaluate an earlier checkpoint"
            )
    return scored
