"""Every place where fairseq's own behaviour is changed, and why. Everything else uses fairseq's public hooks."""

# Importing them makes the changes.
from fairseq_hash.fairseq_patches import (
    averaging,
    checkpoints,
    configuration,
    cpu,
    data_parallel,
    eval_lm,
    generation,
    half_precision,
    model_overrides,
    objective,
    places,
    sharded,
    signals,
    start,
    sweeps,
    tensorboard,
    trainer,
)
from fairseq_hash.fairseq_patches.data_parallel import let_gloo_finish
from fairseq_hash.fairseq_patches.model_building import (
    ForEvaluation,
    allow_bf16_without_tpu,
    language_model_decoder,
    require_supported_fairseq,
    set_architecture,
)
from fairseq_hash.fairseq_patches.registry import one_line_errors
from fairseq_hash.fairseq_patches.start import ignore_warnings

__all__ = [
    "ForEvaluation",
    "allow_bf16_without_tpu",
    "averaging",
    "checkpoints",
    "configuration",
    "cpu",
    "data_parallel",
    "eval_lm",
    "generation",
    "half_precision",
    "ignore_warnings",
    "language_model_decoder",
    "let_gloo_finish",
    "model_overrides",
    "objective",
    "one_line_errors",
    "places",
    "require_supported_fairseq",
    "set_architecture",
    "sharded",
    "start",
    "signals",
    "sweeps",
    "tensorboard",
    "trainer",
]
