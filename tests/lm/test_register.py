"""What importing the package costs, and every way by which a process comes to know the model."""

import subprocess
import sys
from pathlib import Path

import forked
import pytest

import fairseq_hash

USER_DIR = str(Path(fairseq_hash.__file__).parent)

# Is all of it there: the model and its architectures, criterion, optimizer, and the changes of `fairseq_patches`?
CHECK = """
def check():
    from fairseq.criterions import CRITERION_REGISTRY
    from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
    from fairseq.optim import OPTIMIZER_REGISTRY
    from fairseq.trainer import Trainer
    known = "hash_transformer_lm" in MODEL_REGISTRY, "hash_transformer_lm_tiny" in ARCH_MODEL_REGISTRY
    known += "hash_moe" in CRITERION_REGISTRY, "fused_adam" in OPTIMIZER_REGISTRY
    return (*known, Trainer.train_step.__code__.co_filename.endswith("registry.py"))
"""
ALL, NONE = str((True,) * 5), str((False,) * 5)


def run(program, python=forked.run_program):
    """Return what a program prints in a Python without fairseq."""
    done = python(program)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def in_an_empty_python(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "name", ["fairseq_hash", "fairseq_hash.cli", "fairseq_hash.provenance", "fairseq_hash.core.errors"]
)
def test_light_imports(name):
    heavy = ("torch", "fairseq", "numpy", "pandas", "matplotlib", "rich", "hydra")
    program = f"import sys, {name}; print([name for name in {heavy} if name in sys.modules])"
    assert run(program, in_an_empty_python) == "[]"


@pytest.mark.parametrize(
    "words", [["sample", "no.pt"], ["experts", "no.pt", "x"], ["export", "no.pt", "--to", "hf", "out"]]
)
def test_a_missing_checkpoint_is_named_without_torch(words, tmp_path):
    """Importing it takes seconds."""
    (tmp_path / "x").write_text("a\n")
    program = f"import os, sys; os.chdir({str(tmp_path)!r}); sys.modules['torch'] = None\n"
    program += f"from fairseq_hash.cli import main; sys.stderr = sys.stdout; print(main({words}))"
    assert run(program, in_an_empty_python) == "fairseq-hash: no.pt does not exist; give the file of a checkpoint\n1"


def test_imports_without_fairseq():
    program = """
import sys
from importlib import import_module
for name in ("hashing", "table_tools.build_table", "checkpoint.convert", "checkpoint.inspection", "moe.layer"):
    import_module(f"fairseq_hash.{name}")
    print(*(f"{name} imports {other}" for other in ("fairseq", "fairscale") if other in sys.modules))
"""
    assert run(program) == ""


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("import fairseq, fairseq_hash", ALL),
        # What is pickled of a training: fairseq's function comes before the configuration's classes.
        ("import fairseq.distributed.utils, fairseq_hash.options.sparse_options", ALL),
        # Only here somebody has to say it; and then it is late, but not too late.
        ("import fairseq_hash, fairseq; print(check()); fairseq_hash.register()", f"{NONE}\n{ALL}"),
    ],
)
def test_who_is_registered(program, expected):
    assert run(f"{CHECK}\n{program}\nprint(check())") == expected


@pytest.mark.parametrize("first", ["", "import fairseq_hash; fairseq_hash.register()"])
def test_user_dir(first):
    """fairseq's own way; where the package is in the process already, it has to be registered."""
    program = f"""{CHECK}
{first}
from argparse import Namespace
from fairseq import utils
utils.import_user_module(Namespace(user_dir={USER_DIR!r}))
print(check())
"""
    assert run(program) == ALL


def test_registering_changes_nothing_twice():
    """The overrides are made once, and so are the filters of warnings."""
    program = f"""{CHECK}
import warnings, fairseq_hash
fairseq_hash.register()
from fairseq.trainer import Trainer
before = Trainer.train_step, list(warnings.filters)
fairseq_hash.register()
print(before[0] is Trainer.train_step, len(before[1]) == len(warnings.filters), check())
"""
    assert run(program) == f"True True {ALL}"


def test_public_names():
    assert fairseq_hash.__version__ == fairseq_hash.provenance.__version__
    assert callable(fairseq_hash.load)
    with pytest.raises(AttributeError, match="module 'fairseq_hash' has no attribute 'lod'"):
        fairseq_hash.lod  # noqa: B018


def test_hub(data, tmp_path):
    """`from_pretrained` after `import fairseq_hash`, and by `user_dir` in a process that has not seen the package."""
    import plugin

    plugin.train(data, tmp_path, "--router", "hash", "--num-experts", "4", "--sparse-layers", "1", "--max-update", "2")
    load = f"""
from fairseq.models.transformer_lm import TransformerLanguageModel
hub = TransformerLanguageModel.from_pretrained({str(tmp_path)!r}, "checkpoint_last.pt", {str(data)!r}, USER_DIR)
print(type(hub.models[0]).__name__, hub.models[0].decoder.layers[1].sparse.parallel.num_experts)
"""
    named = load.replace("USER_DIR", f"user_dir={USER_DIR!r}")
    assert run(named) == "HashTransformerLanguageModel 4"
    registered = "import fairseq_hash\nfairseq_hash.register()\n" + load.replace(", USER_DIR", "")
    assert run(registered) == "HashTransformerLanguageModel 4"
