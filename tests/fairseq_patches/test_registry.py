"""The overrides: recorded at import, applied once, in the order that is written down."""

import sys
from pathlib import Path

import forked
from fairseq.trainer import Trainer

import fairseq_hash
from fairseq_hash import fairseq_patches
from fairseq_hash.fairseq_patches import ORDER, registry

fairseq_hash.register()
TOOLS = {"__init__", "command_log", "print_sources", "registry", "upstream"}

# What the targets are before the modules are imported, after that, after `apply` and after a second one.
IMPORTING = """
import pkgutil, sys, warnings
import fairseq_hash
targets = [target.rsplit(":", 1) for target in sys.argv[1].split(",")]

def values():
    found = [getattr(pkgutil.resolve_name(owner), name) for owner, name in targets]
    return [list(value) if value is warnings.filters else value for value in found]

import fairseq.trainer, torch.utils.tensorboard, fairseq_cli.eval_lm, fairseq_cli.train
import fairseq_hash.moe.layer, fairseq_hash.hashing
before = values()
from fairseq_hash.fairseq_patches import registry
registry.overrides()
imported = values()
registry.apply()
applied = values()
registry.apply()
same = [name for (_, name), old, new in zip(targets, imported, applied) if old == new]
print(before == imported, same, applied == values())
"""


def run(program, *arguments):
    """Return the last line that a program prints in a Python without fairseq."""
    done = forked.run_program(program, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_importing_changes_nothing_and_applying_twice_is_applying_once():
    """All targets are replaced by `apply`, but Python's way to show errors, which is for fairseq's commands alone."""
    targets = ",".join(dict.fromkeys(f"{entry.owner}:{entry.name}" for entry in registry.overrides()))
    assert run(IMPORTING, targets) == "True ['excepthook'] True"


def test_a_command_that_is_imported_late_is_changed_when_it_starts():
    """`main` of each command calls `import_user_module` first."""
    program = """
import fairseq_hash
fairseq_hash.register()
import fairseq_cli.train
from argparse import Namespace
from fairseq import utils
before = fairseq_cli.train.train
utils.import_user_module(Namespace(user_dir=None))
print(fairseq_cli.train.train is before, fairseq_cli.train.train.__wrapped__ is before)
"""
    assert run(program) == "False True"


def test_a_command_is_changed_as_main_and_as_itself(monkeypatch):
    """Under `python -m` its file is `__main__`; a program's file is not."""
    from fairseq_cli import train

    assert registry.imported("fairseq_cli.train") == [train]
    monkeypatch.setitem(sys.modules, "__main__", main := type(sys)("__main__"))
    main.__file__ = train.__file__
    assert registry.imported("fairseq_cli.train") == [main, train]


def test_the_order_names_every_module():
    folder = Path(fairseq_patches.__file__).parent
    assert sorted(ORDER) == sorted({path.stem for path in folder.glob("*.py")} - TOOLS)


def test_the_order_does_not_come_from_imports(monkeypatch):
    entries = registry.overrides()
    of_one = {module: [entry for entry in entries if entry.module == module] for module in ORDER}
    assert all(of_one.values())
    monkeypatch.setattr(registry, "_recorded", [entry for module in reversed(ORDER) for entry in of_one[module]])
    assert registry.overrides() == entries


def test_the_last_override_of_a_function_is_the_outer_one():
    inner_first = ["averaging", "objective", "signals", "sweeps", "trainer"]
    entries = [entry for entry in registry.overrides() if entry.target == "fairseq.trainer.Trainer.__init__"]
    assert [entry.module for entry in entries] == inner_first
    function, modules = Trainer.__init__, []
    while hasattr(function, "__wrapped__"):
        (entry,) = (cell.cell_contents for cell in function.__closure__ if hasattr(cell.cell_contents, "reason"))
        modules.append(entry.module)
        function = function.__wrapped__
    assert modules == inner_first[::-1]


def test_every_override_says_why():
    for entry in registry.overrides():
        assert entry.reason.endswith(".") and len(entry.reason) > 10, entry.target
