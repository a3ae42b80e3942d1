"""What of a run's configuration makes it another model: its options without seed, places, machines and names."""

from typing import Any

# What may differ between two runs of one model: the seed, places, what a run tells of itself, and what it keeps.
VOLATILE = {
    *("seed", "data", "save_dir", "restore_file", "user_dir", "plasma_path", "max_update", "max_epoch"),
    *("log_file", "log_format", "log_interval", "no_progress_bar", "log_expert_loads"),
    *("tensorboard_logdir", "wandb_project", "azureml_logging", "aim_repo", "aim_run_hash"),
    *("distributed_init_method", "distributed_port", "distributed_rank", "device_id"),
    *("distributed_world_size", "distributed_num_procs", "distributed_no_spawn", "nprocs_per_node"),
    *("distributed_backend", "heartbeat_timeout", "bucket_cap_mb", "num_workers"),
    *("no_save", "no_epoch_checkpoints", "no_last_checkpoints", "no_save_optimizer_state"),
    *("keep_interval_updates", "keep_interval_updates_pattern", "keep_last_epochs", "keep_best_checkpoints"),
    "write_checkpoints_asynchronously",
    *("expert_parallel_size", "expert_dispatch"),  # who holds the experts and how rows get there changes no result
    "recompute_hidden",  # the same numbers in less memory
    "base_shuffle",  # of fairseq's own BASE layer, which the model refuses; flags and Hydra have other defaults
}
# Nodes that are no options of a training: what the experiment is called and how Hydra logs; fairseq's scores of
# translations, which only flags fill in.
ASIDE = {"experiment", "job_logging_cfg", "scoring"}
# Hydra has the model's own name, flags have an architecture's; the sizes that it stands for are options themselves.
MODEL_NAME = "model._name"
# How ranks add up their gradients changes no result, unless each goes its own way for some updates.
BACKEND, OWN_WAY = "ddp_backend", "slowmo"
STOPS = ("optimization.max_update", "optimization.max_epoch")
# What stands for `update_freq` and the number of ranks.
BATCHES = "update_freq x ranks"


def stable(config: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a flat configuration that runs of one model share, by flags or by Hydra, on any machine.

    `update_freq` becomes the number of batches of an update over all ranks: on other ranks it may be another number and
    still the same training (`--update-freq-ranks`), or the same number and another training.
    """
    options = {key: _resolved(config, value) for key, value in config.items() if not _is_aside(key, value)}
    ranks = options.pop("criterion.update_freq_ranks", 0) or config.get("distributed_training.distributed_world_size")
    if "optimization.update_freq" in options:
        options[BATCHES] = [number * (ranks or 1) for number in options.pop("optimization.update_freq")]
    return options


def _is_aside(key: str, value: Any) -> bool:
    name = key.rpartition(".")[2]
    is_place = name in VOLATILE or (name == BACKEND and value != OWN_WAY)
    return is_place or key == MODEL_NAME or key.partition(".")[0] in ASIDE


def _resolved(config: dict[str, Any], value: Any) -> Any:
    """Return what Hydra's `${task.tokens_per_sample}` stands for; fairseq logs some of these as they are."""
    if isinstance(value, str) and value.startswith("${") and value[2:-1] in config:
        return config[value[2:-1]]
    return value
