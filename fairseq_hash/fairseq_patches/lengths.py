"""Samples that are too long: for the model's positions, or for a batch."""

import logging
from collections.abc import Callable
from typing import Any

from fairseq import utils
from fairseq.data import LMContextWindowDataset, MonolingualDataset
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.trainer import Trainer

from fairseq_hash.core.errors import UserError
from fairseq_hash.fairseq_patches.registry import override

logger = logging.getLogger(__name__)


@override("fairseq.tasks.language_modeling.LanguageModelingTask", "get_batch_iterator", one_line=True)
def _leave_nothing_out_unasked(
    original: Callable[..., Any],
    task: LanguageModelingTask,
    dataset: Any,
    max_tokens: "int | None" = None,
    max_sentences: "int | None" = None,
    max_positions: "int | None" = None,
    ignore_invalid_inputs: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Refuse samples that are too long in one line, or say how much of the text is left out with them.

    Upstream: `FairseqTask.get_batch_iterator` goes on without them after a warning, also where next to nothing is left.
    Where it may not, and where a sample does not fit into a batch, it stops with a traceback.
    """
    check_lengths(task, dataset, max_tokens, max_positions, ignore_invalid_inputs)
    return original(task, dataset, max_tokens, max_sentences, max_positions, ignore_invalid_inputs, *args, **kwargs)


@override("fairseq.trainer.Trainer", "get_train_iterator", one_line=True)
def _check_validation_first(original: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    """Refuse what a validation would stop at before the first update.

    Upstream: the first validation, which may come after hours, is the first to look at its text.
    """
    chosen, task = trainer.cfg.dataset, trainer.task
    positions = utils.resolve_max_positions(task.max_positions(), trainer.model.max_positions())
    for subset in [] if chosen.disable_validation else chosen.valid_subset.split(","):
        if subset in task.datasets:
            may_leave_out = chosen.skip_invalid_size_inputs_valid_test
            check_lengths(task, task.dataset(subset), chosen.max_tokens_valid, positions, may_leave_out)
    return original(trainer, *args, **kwargs)


def check_lengths(
    task: LanguageModelingTask,
    dataset: Any,
    max_tokens: "int | None",
    max_positions: "int | None",
    may_leave_out: bool,
    context_window: "int | None" = None,
) -> None:
    """Raise `UserError` unless all samples can be used, or some are left out where that was asked for.

    Args:
        task: whose options say how text is cut.
        dataset: a text of the task; others are not looked at.
        max_tokens: of a batch, None without a limit.
        max_positions: the most tokens of a sample, None without a limit.
        may_leave_out: whether longer samples than that may be left out.
        context_window: of an evaluation, how many tokens each sample is given before its own; None in a training.
    """
    text = dataset.dataset if isinstance(dataset, LMContextWindowDataset) else dataset
    window = context_window or 0
    room = None if max_positions is None else max_positions - window
    limits = [limit for limit in (room, max_tokens) if limit is not None]
    if not isinstance(text, MonolingualDataset) or not limits:
        return
    limit = min(limits)
    too_long = text.sizes[text.sizes > limit]
    if len(too_long) == 0:
        return
    name = next((name for name, known in task.datasets.items() if known is text), "the data")
    limited_by = "--max-tokens" if limit == max_tokens else "the positions of the model"
    what = (
        f"{len(too_long):,} of {len(text):,} samples of {name}, with {too_long.sum():,} of {text.sizes.sum():,} "
        f"tokens, are longer than {limit:,} tokens ({limited_by}{', less --context-window' if window else ''})"
    )
    are_blocks = task.args.sample_break_mode in (None, "none")  # to leave out full ones is to leave out nearly all
    if may_leave_out and limit == room and len(too_long) < len(text) and not are_blocks:
        logger.warning("%s and left out", what)
        return
    cut = f"--tokens-per-sample {limit + window}"
    remedies = [f"cut them by {cut} or less" if are_blocks else f"cut them by --sample-break-mode none {cut}"]
    if limited_by == "--max-tokens":
        remedies.append(f"give --max-tokens {too_long.max()} or more")
    elif context_window is None:
        remedies.append(f"give the model --max-target-positions {too_long.max()}")
        remedies += [] if are_blocks or may_leave_out else ["leave them out by --skip-invalid-size-inputs-valid-test"]
    raise UserError(f"{what}; {', or '.join(remedies)}")
