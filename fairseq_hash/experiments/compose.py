"""Compose an experiment's configuration, as `fairseq-hydra-train` does, without training."""

import difflib
import importlib
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults, hydra_init
from fairseq.dataclass.utils import omegaconf_no_object_check
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.yaml_text import check_yaml
from fairseq_hash.experiments.names import experiment_names
from fairseq_hash.lm.model import HashTransformerLMConfig

# Imported because they register themselves: their defaults belong to the configuration.
from fairseq_hash.options.criterion_options import HashMoECriterionConfig

FAIRSEQ_KEYS = tuple(FairseqConfig.__dataclass_fields__)
# Groups of which an experiment chooses one option each.
NAMED = ("task", "model", "criterion", "optimizer", "lr_scheduler")


@dataclass(frozen=True)
class Experiment:
    """A composed configuration.

    Attributes:
        name: such as `reddit/hash_1x64`.
        config: fairseq's whole configuration, resolved, with all defaults.
        about: its node `experiment`.
        folder: the run's folder, relative to the current folder.
    """

    name: str
    config: DictConfig
    about: dict[str, Any]
    folder: Path


def compose(config_dir: Path, name: str, overrides: Sequence[str] = ()) -> Experiment:
    """Compose an experiment with overrides in Hydra's grammar (`model.num_experts=8`).

    Raises:
        UserError: with one line, if there is no such experiment, key, option or value.
    """
    if tuple(map(int, hydra.__version__.split(".")[:2])) < (1, 3):  # the fairseq release has 1.0
        raise UserError(
            f"the configurations need Hydra 1.3, but this is {hydra.__version__}; use the project's set-up, or flags"
        )
    importlib.import_module("fairseq_hash.experiments.run_folder")  # as Hydra does
    if not config_dir.is_dir():
        raise UserError(f"{config_dir} is no folder; give the folder of the configurations (--config-dir configs)")
    if not (config_dir / f"{name}.yaml").is_file():
        near = difflib.get_close_matches(name, experiment_names(config_dir), n=3, cutoff=0.3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise UserError(f"{config_dir} has no experiment {name}{hint} (fairseq-hash plan --list names all)")
    for path in config_dir.rglob("*.yaml"):
        check_yaml(path)
    hydra_init()
    before = HydraConfig.instance().cfg
    try:
        with warnings.catch_warnings():  # fairseq asks for Hydra 1.1's behaviour, which Hydra warns about
            warnings.simplefilter("ignore")
            with hydra.initialize_config_dir(str(config_dir.resolve()), version_base="1.1"):
                config = hydra.compose(name, list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        return _finished(name, config)
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"{name}: its files refer to themselves, or are nested too deeply") from error
    # Hydra's own errors, and those that it does not expect, such as for a list where a name must be.
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{name}: {_one_line(error)}") from error
    except SystemExit as error:  # raised by `fairseq_patches.configuration` when fairseq merges in the defaults
        raise UserError(f"{name}: {str(error).removeprefix('fairseq_hash: ')}") from error
    finally:
        HydraConfig.instance().cfg = before


def _finished(name: str, config: DictConfig) -> Experiment:
    """Do the same as `_hydra_main` in fairseq_cli/hydra_train.py between Hydra and the training."""
    folder = Path(config.hydra.run.dir)
    OmegaConf.set_readonly(config.hydra, False)
    config.hydra.runtime.output_dir = str(folder)
    HydraConfig.instance().set_config(config)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    if unknown := sorted(set(config) - {*FAIRSEQ_KEYS, "experiment"}):
        raise UserError(f"{name}: {unknown[0]} is not a group of options; the groups are {', '.join(FAIRSEQ_KEYS)}")
    if empty := [group for group in NAMED if config.get(group) is None]:
        raise UserError(f"{name}: {empty[0]} is empty; give one ({empty[0]}: {{_name: ...}}), or leave the line out")
    add_defaults(config)
    for group in FAIRSEQ_KEYS:
        known = getattr(OmegaConf.get_type(config, group), "__dataclass_fields__", None)
        if known and (unknown := [key for key in config[group] if key not in known]):
            raise UserError(f"{name}: {unknown_key(group, unknown[0], known)}")
    with omegaconf_no_object_check():
        config = OmegaConf.create(OmegaConf.to_container(config, resolve=True, enum_to_str=True))
    about = OmegaConf.to_container(config.pop("experiment")) if "experiment" in config else {}
    OmegaConf.set_struct(config, True)
    return Experiment(name, config, about, folder)


def unknown_key(group: str, key: str, known: Iterable[str]) -> str:
    """Return one line about an option that a group lacks; `known` are the group's options."""
    near = difflib.get_close_matches(key, known, n=3)
    hint = f"near: {', '.join(near)}" if near else f"{group} has {', '.join(known)}"
    return f"there is no option {group}.{key}; {hint}"


def _one_line(error: Exception) -> str:
    """Return Hydra's or OmegaConf's message in one line, with a better text for an option that no file names."""
    unnamed = re.search(r"Could not override '(\w+)\.(\w+)'", str(error))
    if unnamed:
        group, key = unnamed.groups()
        node = {"model": HashTransformerLMConfig, "criterion": HashMoECriterionConfig}.get(group)
        known = getattr(node or getattr(FairseqConfig, group, None), "__dataclass_fields__", ())
        if key in known:
            return f"no file of this experiment names {group}.{key}; give it with a plus: +{group}.{key}=..."
        return unknown_key(group, key, known)
    lines = [line.strip().rstrip(".") for line in f"{error}\n{error.__cause__ or ''}".splitlines()]
    kept = dict.fromkeys(line for line in lines if line and not line.startswith(("reference_type", "object_type")))
    return ", ".join(kept).replace(":,", ":")
