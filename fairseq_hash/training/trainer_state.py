"""What the plugin keeps of one training, in one place: fairseq's trainer has it as `hash_state`."""

from dataclasses import dataclass, field

from fairseq_hash.checkpoint.trainer_checkpoints import TrainingCheckpoints
from fairseq_hash.training.expert_monitor import ExpertMonitor
from fairseq_hash.training.shared_experts import SharedTraining


@dataclass
class TrainerState:
    """Made when the trainer has been made. The first three stay as they are; the others change as it trains.

    Attributes:
        shared: what ranks that share experts need; None if every rank holds all experts.
        checkpoints: what saving and loading needs.
        monitor: what measures the experts (`--monitor-interval`); None if nothing does.
        real_batches: which batches of the current update have text; [] between updates.
        saved_update: the number of updates at the last save; None before the first.
    """

    shared: SharedTraining | None
    checkpoints: TrainingCheckpoints
    monitor: ExpertMonitor | None = None
    real_batches: list[bool] = field(default_factory=list)
    saved_update: int | None = None
