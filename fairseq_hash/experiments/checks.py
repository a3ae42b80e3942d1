"""Checks whether an experiment can run here: its data, its files and its number of ranks."""

import os
from pathlib import Path

from fairseq.criterions import CRITERION_REGISTRY
from omegaconf import DictConfig

from fairseq_hash.core.errors import UserError
from fairseq_hash.experiments.compose import Experiment
from fairseq_hash.experiments.memory import place_of
from fairseq_hash.hashing.dictionary import read_dictionary
from fairseq_hash.hashing.registry import BUILDERS
from fairseq_hash.lm.placement import loads_of_file
from fairseq_hash.lm.table_buffers import build_tables
from fairseq_hash.moe.dispatchers import DISPATCHERS
from fairseq_hash.options import option_use
from fairseq_hash.options.sparse_options import SparseOptions
from fairseq_hash.parallel.placement import BALANCED, CONTIGUOUS
from fairseq_hash.training.shared_experts import check_training, scaled_update_freq


def check_experiment(experiment: Experiment, ranks: int) -> None:
    """Raise `UserError` for the first reason for which a training on `ranks` ranks would not start."""
    config = experiment.config
    options = SparseOptions.from_config(config.model)
    options.check()
    in_vain(config)
    if config.dataset.max_tokens < config.task.tokens_per_sample:
        raise UserError(
            f"dataset.max_tokens={config.dataset.max_tokens} holds no sample of task.tokens_per_sample="
            f"{config.task.tokens_per_sample}; make it larger"
        )
    meant_for = config.criterion.get("update_freq_ranks", 0)
    if meant_for:
        scaled_update_freq(list(config.optimization.update_freq), meant_for, ranks)
    options.memory_numbers(config.model.decoder_layers)
    if options.is_sparse:
        options.layer_routers(config.model.decoder_layers)
        place = place_of(config, ranks)
        if options.expert_placement not in (BALANCED, CONTIGUOUS):
            loads_of_file(options, config.model.decoder_layers)
        if place.is_shared:
            check_training(config, DISPATCHERS[options.expert_dispatch], options.expert_replicas > 0)
    check_data(config.task.data, (config.dataset.train_subset, *config.dataset.valid_subset.split(",")))
    check_files(experiment, options)
    if "hash" in options.routers:
        check_tables(config, options)


def in_vain(config: DictConfig) -> list[str]:
    """Return the options that a dense experiment does not use; raise `UserError` if other options cannot act."""
    options, kind = SparseOptions.from_config(config.model), CRITERION_REGISTRY[config.criterion._name]
    return option_use.check_model(options) + option_use.check_criterion(kind, config.criterion, options)


def check_data(folders: "str | None", subsets: tuple[str, ...]) -> None:
    """Raise `UserError` if a folder of binarized data, or one of several, lacks a dictionary or a subset."""
    for place, folder in enumerate((folders or "").split(os.pathsep)):
        wanted = subsets if place == 0 else subsets[:1]  # fairseq reads other folders for training only
        names = ["dict.txt", *(f"{subset}.{kind}" for subset in wanted for kind in ("bin", "idx"))]
        missing = [name for name in names if not (Path(folder) / name).is_file()]
        if not folder or missing:
            raise UserError(
                f"task.data={folder} holds no {missing[0]}; prepare the data (fairseq-hash data, docs/experiments.md "
                "has the command), or give the folder of the data as task.data=DIR"
            )


def check_tables(config: DictConfig, options: SparseOptions) -> None:
    """Raise `UserError` if the hash tables cannot be built for this data's dictionary, or do not fit."""
    symbols, counts = read_dictionary(Path(config.task.data.split(os.pathsep)[0]) / "dict.txt")
    shape = options.table_shape(options.num_experts, config.task.tokens_per_sample)
    build_tables(options, symbols, counts, shape, options.hash_layers)


def check_files(experiment: Experiment, options: SparseOptions) -> None:
    """Raise `UserError` if a table or a checkpoint that the experiment starts from is missing."""
    config = experiment.config
    files = [("checkpoint.finetune_from_model", config.checkpoint.finetune_from_model)]
    files.append(("model.from_dense", options.from_dense))
    if "hash" in options.routers:
        files.append(("model.hash_predictor", options.hash_predictor))
        tables = [name.strip() for name in options.hash_table.split(",")]
        files += [("model.hash_table", name) for name in tables if name not in BUILDERS]
    for key, path in files:
        if path and not Path(path).is_file():
            raise UserError(f"{key}={path} does not exist; make it first (docs/experiments.md), or give another")
