"""The part of a run's configuration that defines its model: its options without seed, paths, machines and names."""

from typing import Any

# Options that may differ between two runs of one model: the seed, paths, logging, and which files are kept.
VOLATILE = {
    *("seed", "data", "save_dir", "restore_file", "user_dir", "plasma_path", "max_update", "max_epoch"),
    *("log_file", "log_format", "log_interval", "no_progress_bar", "log_expert_loads"),
    *("monitor_interval", "monitor_patience", "monitor_overload"),
    *("tensorboard_logdir", "wandb_project", "azureml_logging", "aim_repo", "aim_run_hash"),
    *("distributed_init_method", "distributed_port", "distributed_rank", "device_id"),
    *("distributed_world_size", "distributed_num_procs", "distributed_no_spawn", "nprocs_per_node"),
    *("distributed_backend", "heartbeat_timeout", "bucket_cap_mb", "num_workers"),
    *("no_save", "no_epoch_checkpoints", "no_last_checkpoints", "no_save_optimizer_state"),
    *("keep_interval_updates", "keep_interval_updates_pattern", "keep_last_epochs", "keep_best_checkpoints"),
    "write_checkpoints_asynchronously",
    # The ranks of the experts and the dispatcher change no result.
    *("expert_parallel_size", "expert_dispatch", "expert_placement", "expert_replicas"),
    "recompute_hidden",  # the same numbers in less memory
    "base_shuffle",  # of fairseq's own BASE layer, which the model refuses; flags and Hydra have other defaults
}
# Nodes that are no options of a training: the experiment's name, Hydra's logging, and fairseq's scores of translations,
# which only flags fill in.
ASIDE = {"experiment", "job_logging_cfg", "scoring"}
# Hydra gives the model's name, flags the architecture's. The sizes of an architecture are options themselves.
MODEL_NAME = "model._name"
# How ranks add up their gradients changes no result, unless they synchronise only every few updates.
BACKEND, OWN_WAY = "ddp_backend", "slowmo"
STOPS = ("optimization.max_update", "optimization.max_epoch")
# Replaces `update_freq` and the number of ranks.
BATCHES = "update_freq x ranks"


def stable(config: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a flat configuration that runs of one model share, with flags or Hydra, on any machine.

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
    """Return the value of Hydra's `${task.tokens_per_sample}`; fairseq logs some references unresolved."""
    if isinstance(value, str) and value.startswith("${") and value[2:-1] in config:
        return config[value[2:-1]]
    return value
