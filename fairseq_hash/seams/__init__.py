"""Every place where fairseq's own behaviour is changed, and why. Everything else uses fairseq's public hooks."""

# Importing them makes the changes.
from fairseq_hash.seams import (
    averaging,
    checkpoints,
    configuration,
    cpu,
    distributed,
    evaluation,
    generation,
    half_precision,
    model_overrides,
    objective,
    places,
    sharded,
    start,
    stopping,
    sweeps,
    tensorboard,
    training,
)
from fairseq_hash.seams.building import (
    allow_bf16_without_tpu,
    language_model_decoder,
    require_supported_fairseq,
    set_architecture,
)
from fairseq_hash.seams.distributed import let_gloo_finish
from fairseq_hash.seams.override import one_line_errors
from fairseq_hash.seams.start import ignore_warnings

__all__ = [
    "allow_bf16_without_tpu",
    "averaging",
    "checkpoints",
    "configuration",
    "cpu",
    "distributed",
    "evaluation",
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
    "stopping",
    "sweeps",
    "tensorboard",
    "training",
]
