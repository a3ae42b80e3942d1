"""Load a checkpoint for inspection: dictionary, tokenizer, and the model with all its experts."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, utils
from fairseq.models import FairseqLanguageModel
from fairseq.tasks.language_modeling import LanguageModelingTask
from omegaconf import open_dict

from fairseq_hash.api.language_model import LanguageModel
from fairseq_hash.api.tokenizer import tokenizer_for
from fairseq_hash.checkpoint.loading import loading_weights_only, one_line, read_checkpoint
from fairseq_hash.core.errors import UserError
from fairseq_hash.core.quiet import only_warnings

DICTIONARY = "dict.txt"
PathLike = str | os.PathLike[str]


def load(
    path: PathLike,
    data: "PathLike | None" = None,
    sentencepiece: "PathLike | None" = None,
    device: "str | torch.device" = "cpu",
    map_experts: bool = False,
    hash_predictor: "PathLike | None" = None,
) -> LanguageModel:
    """Load a language model for inference, in fp32, with all its experts. No code from the checkpoint is run.

    Args:
        path: a checkpoint of this package's models or of fairseq's own language models: the main file if the experts
            are in shards, or a plain file.
        data: folder with the model's `dict.txt`. Default: the training's data folder or, if that is gone, the
            checkpoint's own folder.
        sentencepiece: the SentencePiece model. Default: `sentencepiece.model` beside `dict.txt`; if there is none,
            tokens are words.
        device: cpu, cuda or cuda:N.
        map_experts: leave the experts in the checkpoint's files, for models that do not fit into memory.
        hash_predictor: for `--hash-feature predicted`, the new path of the predicting model, if it was moved.

    Returns:
        The model, ready to use.

    Raises:
        UserError: with one line, if a file is missing or damaged, or belongs to another model or dictionary.
    """
    path = Path(path)
    device = check_device(device)
    if sentencepiece is not None and not Path(sentencepiece).is_file():
        raise UserError(
            f"sentencepiece {sentencepiece} does not exist; give the model with which the data was prepared"
        )
    try:
        # Whoever looks at a model has asked something else than what fairseq and the model tell of themselves.
        with only_warnings("fairseq", "fairseq_hash"), loading_weights_only():
            task_options = task_of(read_checkpoint(path, is_checked=False), path)
            folder = dictionary_folder(path, task_options.get("data"), data)
            state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
            changed = {"map_experts": map_experts or None, "hash_predictor": hash_predictor and str(hash_predictor)}
            _change(state["cfg"], folder, {name: value for name, value in changed.items() if value is not None}, path)
            (model,), configuration, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], state=state)
    except SystemExit as error:  # the error line of a function that fairseq calls
        raise UserError(str(error).removeprefix("fairseq_hash: ")) from error
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the model of its own options: {one_line(error)}") from error
    except KeyError as error:
        raise UserError(f"{path} is not a checkpoint of fairseq-train: it lacks {error}") from error
    if not isinstance(model, FairseqLanguageModel) or not isinstance(task, LanguageModelingTask):
        raise UserError(f"{path} is a {type(model).__name__}, no language model; give a checkpoint of one")
    given = Path(sentencepiece) if sentencepiece is not None else None
    tokenizer = tokenizer_for(folder, given, task.source_dictionary)
    return LanguageModel(model.to(device).eval().requires_grad_(False), task, configuration, tokenizer)


def check_device(device: "str | torch.device") -> torch.device:
    """Return a device. Raises `UserError` if it is unknown or does not exist."""
    try:
        known = torch.device(device)
    except RuntimeError:
        known = None
    if known is None or known.type not in ("cpu", "cuda"):
        raise UserError(f"device {device} is unknown; give cpu, cuda or cuda:N")
    if known.type == "cuda" and (known.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device} is not there (GPUs that torch sees: {torch.cuda.device_count()}); use cpu")
    return known


def task_of(state: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return the task's options of a checkpoint. Raises `UserError` if it is not of a language model."""
    if state.get("cfg") is None:
        raise UserError(f"{path} does not say how its model was made (no cfg); give a checkpoint of fairseq-train")
    options = state["cfg"].get("task") if isinstance(state["cfg"], Mapping) else None
    if not isinstance(options, Mapping):
        raise UserError(
            f"{path} does not say what it was trained for (no cfg.task); give a checkpoint of fairseq-train"
        )
    if options.get("_name") != "language_modeling":
        raise UserError(f"{path} was trained for the task {options.get('_name')}; give a model of language_modeling")
    return options


def dictionary_folder(path: Path, trained_on: "str | None", given: "PathLike | None") -> Path:
    """Return the folder of a checkpoint's dictionary.

    `trained_on` is the data of its training, perhaps several folders; fairseq reads the dictionary of the first one.
    `given` is a folder that the user gives instead. Raises `UserError` if there is no dictionary.
    """
    folders = [*map(Path, utils.split_paths(trained_on or "")[:1]), path.parent]
    if given is not None:
        folders = [Path(given)]
    for folder in folders:
        if (folder / DICTIONARY).is_file():
            return folder
    where = " or ".join(str(folder / DICTIONARY) for folder in folders)
    raise UserError(f"{path}: its dictionary is not there ({where}); give its folder as data")


def _change(configuration: Any, folder: Path, changed: Mapping[str, Any], path: Path) -> None:
    """Set the data folder and options of the model. Raises `UserError` for options of a model without experts."""
    if changed and configuration.model.get("router") in (None, "", "none"):
        raise UserError(f"{path} has no experts of this package; leave out {' and '.join(changed)}")
    with open_dict(configuration):
        configuration.task.data = str(folder)
        for name, value in changed.items():
            configuration.model[name] = value
