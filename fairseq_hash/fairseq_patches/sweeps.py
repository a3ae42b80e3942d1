"""Several trainings one after the other in one process, as joblib's workers do them in a sweep."""

from collections.abc import Callable
from typing import Any

from fairseq import checkpoint_utils
from fairseq.logging import progress_bar
from fairseq.trainer import Trainer

from fairseq_hash.fairseq_patches.registry import imported, override


@override("fairseq.trainer.Trainer", "__init__")
def _start_afresh(original: Callable[..., None], trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    """Forget the training before.

    Upstream: the best loss so far, the count of --patience and TensorBoard's files belong to the process. A second
    training saves no best checkpoint until it is better than the first one, and its curves go into the first one's
    folder.
    """
    original(trainer, *args, **kwargs)
    kept = [checkpoint_utils.save_checkpoint, *(loop.should_stop_early for loop in imported("fairseq_cli.train"))]
    for function in kept:
        for name in ("best", "num_runs"):
            getattr(function, "__dict__", {}).pop(name, None)
    writers = getattr(progress_bar, "_tensorboard_writers", None) or {}
    for writer in writers.values():
        writer.close()
    writers.clear()
