"""Selects the evaluations that count: complete, of the whole text, and of the model at the end of its training."""

from fairseq_hash.reporting.logs import Evaluation, TrainingLog


def why_no_result(evaluation: Evaluation, training: TrainingLog) -> "str | None":
    """Return why an evaluation does not count as a result of a training, None if it counts."""
    config, again = evaluation.config, f"repeat it with --tokens-per-sample {_length(training)}"
    if evaluation.perplexity is None:
        return f"has no result: {evaluation.error or 'its log ends without one'}"
    if evaluation.skipped:
        return f"left out {evaluation.skipped:,} samples that were too long for the model; {again}"
    if evaluation.tokens == 0:
        return f"scored no token; {again}"
    ranks = config.get("distributed_training.distributed_world_size")
    parts = max(config.get("dataset.num_shards") or 1, ranks or 1)
    if parts > 1:
        return f"scored one of {parts} parts of the text; repeat it in one process, without --num-shards"
    if training.finished is not None and evaluation.time < training.finished:
        return "was made before training was done; repeat it"
    models = [one["dictionary_fingerprint"] for one in (evaluation.model, training.model) if one]
    if len(set(models)) > 1:
        return "was made with another dictionary than the training"
    return None


def _length(training: TrainingLog) -> object:
    return training.config.get("task.tokens_per_sample")
