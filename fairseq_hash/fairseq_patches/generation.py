"""Generation, and everything else for which samples are put into batches."""

from collections.abc import Callable
from typing import Any

from fairseq_hash.core.errors import UserError
from fairseq_hash.fairseq_patches.registry import override


@override("fairseq.tasks.language_modeling.LanguageModelingTask", "filter_indices_by_size", one_line=True)
def _name_too_long_texts(
    original: Callable[..., Any],
    task: Any,
    indices: Any,
    dataset: Any,
    max_positions: Any = None,
    *args: Any,
    **kw: Any,
) -> Any:
    """Say in one line that a text is too long for the model.

    Upstream: a bare `Exception`, which `fairseq-interactive` shows as a traceback.
    """
    try:
        return original(task, indices, dataset, max_positions, *args, **kw)
    except Exception as error:
        if not str(error).startswith("Size of sample"):
            raise
        longest = max(int(dataset.size(index)) for index in indices)
        raise UserError(
            f"a text of {longest} tokens is too long: the model, or --max-tokens, takes {max_positions} at once; give "
            "shorter ones, or leave them out by --skip-invalid-size-inputs-valid-test"
        ) from error
