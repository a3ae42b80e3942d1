"""The functions of fairseq that the overrides were written against, and what is said of others."""

import importlib.util
import inspect
import re
from importlib import metadata
from pathlib import Path

import forked
import pytest

import fairseq_hash
from fairseq_hash.fairseq_patches import registry, upstream

fairseq_hash.register()
RECIPE = Path(__file__).resolve().parents[2] / "scripts" / "build_fairseq.py"

# Another function, as a later fairseq or another plugin would bring it.
CHANGED = """
import fairseq.trainer
from fairseq import utils

def another(*arguments):
    return arguments

another.__module__ = "fairseq.trainer"
fairseq.trainer.Trainer.clip_grad_norm = utils.clip_grad_norm_ = another
import fairseq_hash
fairseq_hash.register()
"""
MISSING = """
import fairseq.trainer
before = fairseq.trainer.Trainer.train_step
del fairseq.trainer.Trainer.clip_grad_norm
try:
    import fairseq_hash
finally:
    print("as before:", fairseq.trainer.Trainer.train_step is before)
"""


def originals():
    """Return target -> what fairseq has there without the plugin."""
    found = {}
    for entry in registry.overrides():
        owner = registry.resolve_name(entry.owner)
        known = registry._originals.get((owner, entry), getattr(owner, entry.name))
        found.setdefault(entry.target, known)
    return found


def test_every_function_of_fairseq_has_its_hash():
    assert sorted(upstream.SOURCES) == sorted(
        name for name, value in originals().items() if upstream.is_fairseqs(value)
    )
    assert all(re.fullmatch("[0-9a-f]{16}", known) for known in upstream.SOURCES.values())


def test_other_libraries_functions_and_values_have_none():
    others = {name for name, value in originals().items() if not upstream.is_fairseqs(value)}
    assert "torch.utils.data._utils.worker._worker_loop" in others
    assert "fairseq.utils.multi_tensor_l2norm_available" in others


def test_all_are_known_here():
    states = [registry.is_source_known(entry) for entry in registry.overrides()]
    assert False not in states and states.count(True) > 40


def test_the_release_has_the_same_sources():
    """Those of this build with the edits of scripts/build_fairseq.py taken back."""
    spec = importlib.util.spec_from_file_location("build_fairseq", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    if metadata.version("fairseq") != recipe.VERSION:
        pytest.skip("this fairseq is not built by scripts/build_fairseq.py")
    differing = {}
    for target in upstream.SOURCES:
        original = inspect.unwrap(originals()[target])
        source = inspect.getsource(original)
        for name, old, new, _ in recipe.REWRITES:
            if inspect.getfile(original).endswith(f"/{name}"):
                source = source.replace(new, old)
        if upstream.hash_of(source) != upstream.SOURCES[target]:
            differing[target] = upstream.hash_of(source)
    assert differing == upstream.OF_THE_RELEASE


def test_white_space_does_not_count():
    assert upstream.hash_of("def f(x):\n    return x\n") == upstream.hash_of("  def f(x):\r\n\treturn x")
    assert upstream.hash_of("def f(x):\n    return x\n") != upstream.hash_of("def f(x):\n    return -x\n")


def test_changed_functions_are_named_in_one_line(tmp_path):
    (tmp_path / "program.py").write_text(CHANGED)
    done = forked.run_python([tmp_path / "program.py"], 120)
    (line,) = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 0
    assert re.search(
        rf"fairseq {re.escape(metadata.version('fairseq'))} has another fairseq\.utils\.clip_grad_norm_, "
        r"fairseq\.trainer\.Trainer\.clip_grad_norm than .*; install fairseq 0\.12\.2 \(scripts/build_fairseq\.py",
        line,
    )


def test_a_missing_function_ends_in_one_line_before_anything_is_changed(tmp_path):
    (tmp_path / "program.py").write_text(MISSING)
    done = forked.run_python([tmp_path / "program.py"], 120)
    assert (done.returncode, done.stdout) == (1, "as before: True\n")
    (line,) = done.stderr.splitlines()
    assert re.match(r"fairseq_hash: fairseq \S+ has no fairseq\.trainer\.Trainer\.clip_grad_norm; install ", line)
