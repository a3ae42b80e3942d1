"""Options as fields of a dataclass, each with its help text; fairseq and our own commands make arguments of them."""

import argparse
from dataclasses import MISSING, field, fields
from types import NoneType
from typing import Any, get_args, get_type_hints


def option(default: Any = MISSING, help: str = "", **more: Any) -> Any:
    """Return a dataclass field with a help text. Without a default the option is required.

    `more` are further keywords for argparse, such as `metavar`; `flag`, if the argument is not named as the field is.
    """
    return field(default=default, metadata={"help": help, **more})


def flag_of(name: str) -> str:
    """Return how a field is named on the command line: `top_k` is --top-k."""
    return f"--{name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Add an argument for each field of a dataclass that `option` made: with its type, default and help text."""
    hints = get_type_hints(kind)
    for f in fields(kind):
        if "help" in f.metadata:
            words = {"dest": f.name, "default": f.default, **f.metadata}
            flag = words.pop("flag", flag_of(f.name))
            if f.default is MISSING:
                words |= {"default": None, "required": True}
            of_field = [hint for hint in get_args(hints[f.name]) or (hints[f.name],) if hint is not NoneType]
            words = {"action": "store_true", **words} if of_field == [bool] else {"type": of_field[0], **words}
            parser.add_argument(flag, **words)


def given_options(kind: type, arguments: argparse.Namespace) -> Any:
    """Return the dataclass with the values that a command line gives to its fields."""
    return kind(**{f.name: getattr(arguments, f.name) for f in fields(kind)})
