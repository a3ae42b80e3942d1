"""An experiment as `fairseq-train`'s command line: the same run, without Hydra."""

import argparse
from collections.abc import Iterator
from typing import Any

from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import DictConfig, OmegaConf

from fairseq_hash.core.errors import UserError

# Groups of which `fairseq-train` takes one option by name.
CHOSEN = {"task": "--task", "model": "--arch", "criterion": "--criterion", "optimizer": "--optimizer"}
CHOSEN |= {"lr_scheduler": "--lr-scheduler"}
PLAIN = ("common", "distributed_training", "dataset", "optimization", "checkpoint", "bmuf", "ema")


def flags(config: DictConfig) -> list[str]:
    """Return the arguments of `fairseq-train` that make the same configuration.

    Only values that differ from the command's own defaults are named. Raises `UserError` for a value that no flag can
    give.
    """
    wanted = OmegaConf.to_container(config)
    words = [wanted["task"]["data"]]
    words += [word for group, flag in CHOSEN.items() for word in (flag, wanted[group]["_name"])]
    if "total_num_update" in wanted["lr_scheduler"]:  # as a flag it has no default, and fairseq stops without it
        words += ["--total-num-update", str(wanted["lr_scheduler"]["total_num_update"])]
    parser = options.get_training_parser()  # while it parses, fairseq adds the options of the chosen groups
    given = OmegaConf.to_container(convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, words)))
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    done = set()  # several groups may have the same option
    for group in (*CHOSEN, *PLAIN):
        for key, value in wanted[group].items():
            if key not in done and key in actions and value != given[group].get(key):
                words += _words(f"{group}.{key}", actions[key], value)
                done.add(key)
    return words


def _words(name: str, action: argparse.Action, value: Any) -> Iterator[str]:
    flag = max(action.option_strings, key=len)
    if isinstance(value, bool):
        if value is not action.const:
            raise UserError(f"{name}={value} has no flag: {flag} can only make it {action.const}")
        yield flag
    elif value is None:
        raise UserError(f"{name}=null has no flag; leave the option at its default")
    else:
        yield flag
        yield ",".join(map(str, value)) if isinstance(value, list) else str(value)
