"""What fairseq's commands say with the plugin: no warnings of their own making, no wrong numbers."""

import json
import re
import subprocess
import sys
from argparse import Namespace
from importlib import metadata
from pathlib import Path

import fairseq
import hydra
import plugin
import pytest
from fairseq import options
from fairseq.dataclass import utils
from omegaconf import DictConfig, OmegaConf

from fairseq_hash.fairseq_patches.start import Corrections

RECIPE = Path(__file__).resolve().parents[2] / "scripts" / "build_fairseq.py"
SPARSE = ("--router", "hash", "--num-experts", "4", "--sparse-layers", "1")
# Of the tiny model of `plugin`: D 16, F 32, 4 experts of two matrices and two biases.
EXPERTS = 4 * (16 * 32 + 32 + 32 * 16 + 16)
REBUILT = [
    metadata.version("fairseq").split("+")[0] + "+" + name for name in re.findall(r"rebuilt\.\d+", RECIPE.read_text())
]
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| INFO \| [\w.]+ \| .*")


def counts(output):
    """Return what fairseq says of parameters: {name: (all, trained)}."""
    found = re.findall(r"num\. (\w+) model params: ([\d,]+) \(num\. trained: ([\d,]+)\)", output)
    return {name: tuple(int(number.replace(",", "")) for number in numbers) for name, *numbers in found}


def assert_lines_of_a_log(output):
    """Every line is one that a logger wrote on purpose, or a line of the printed model."""
    for line in output.splitlines():
        assert LINE.fullmatch(line) or re.fullmatch(r" *\(.*|[ )]*", line), line


def test_a_sparse_training_and_its_evaluation(data, tmp_path):
    done = plugin.train(data, tmp_path, *SPARSE, "--num-workers", "1", "--tensorboard-logdir", tmp_path / "tensorboard")
    output = done.stdout + done.stderr
    assert_lines_of_a_log(output)
    record = json.loads(re.search(r"model_record \| (.*)", output)[1])
    dense = record["parameters_total"] - EXPERTS
    assert counts(output) == {"shared": (dense, dense), "expert": (EXPERTS, EXPERTS)}
    assert "training on 1 CPU processes" in output and "GPU" not in output.replace("GPUs/TPUs)'", "")
    shape = ["--tokens-per-sample", "16", "--max-tokens", "256", "--cpu", "--user-dir", plugin.USER_DIR]
    done = plugin.command("eval_lm", data, "--path", tmp_path / "checkpoint_best.pt", "--gen-subset", "valid", *shape)
    assert_lines_of_a_log(done.stdout + done.stderr)


def flat(config):
    """Return a configuration as lists, in which the order counts."""
    if isinstance(config, Namespace):
        config = vars(config)
    elif isinstance(config, DictConfig):
        config = OmegaConf.to_container(config)
    return [(key, flat(value)) for key, value in config.items()] if isinstance(config, dict) else [type(config), config]


TYPED = ("--optimizer", "adam", "--lr", "1e-5,0.5", "--clip-norm", "inf", "--fp16", "--update-freq", "2,3")
TEXTS = ("--restore-file", "it's here = \\x, [1].pt", "--bpe", "sentencepiece", "--ddp-backend", "legacy_ddp")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "parser, words",
    [
        ("training", (*plugin.TINY, "--router", "none")),
        ("training", (*plugin.TINY, *SPARSE, *TYPED)),
        ("training", (*plugin.TINY, *plugin.ROUTERS["switch"], *TEXTS, "--lr-scheduler", "inverse_sqrt")),
        ("training", ("--arch", "transformer_lm_gpt", "--optimizer", "adafactor", "--lr-scheduler", "cosine")),
        ("eval_lm", ("--path", "a:b", "--model-overrides", "{'map_experts': True, 'x': \"y's\"}")),
        ("generation", ("--path", "a b", "--beam", "5", "--lenpen", "0.5", "--sampling-topp", "0.9")),
    ],
)
def test_flags_make_the_configuration_that_hydra_makes_of_them(data, monkeypatch, parser, words):
    words = [str(data), "--task", "language_modeling", *words]
    args = options.parse_args_and_arch(getattr(options, f"get_{parser}_parser")(), words)
    ours = flat(utils.convert_namespace_to_omegaconf(args))
    folder = str(Path(fairseq.__file__).parent / "config")
    monkeypatch.setattr(utils, "initialize", lambda config_path: hydra.initialize_config_dir(folder))
    monkeypatch.setattr(utils, "compose", lambda name, overrides, strict: hydra.compose(name, overrides))
    assert flat(utils.convert_namespace_to_omegaconf(args)) == ours


def test_a_dense_training_says_nothing_of_experts(data, tmp_path):
    done = plugin.train(data, tmp_path, "--max-update", "1")
    assert_lines_of_a_log(done.stdout + done.stderr)
    assert list(counts(done.stdout + done.stderr)) == ["shared"]


def test_frozen_parameters_and_experts_of_other_ranks(data, monkeypatch):
    """The numbers are of the whole model, wherever its experts are."""
    _, _, model, _ = plugin.build(data, *SPARSE, "--freeze", "experts")
    layer = model.decoder.layers[1].sparse
    total = sum(parameter.numel() for parameter in model.parameters())
    # This rank has the first two.
    for parameter in layer.experts.parameters():
        parameter.data = parameter.data[:2]
    corrections = Corrections()
    assert corrections(model) is model
    shared = corrections("num. shared model params: 1 (num. trained: 1)")
    experts = corrections("num. expert model params: 0 (num. trained: 0)")
    dense = total - EXPERTS
    assert counts(f"{shared}\n{experts}") == {"shared": (dense, dense), "expert": (EXPERTS, 0)}


@pytest.mark.skipif(metadata.version("fairseq") not in REBUILT, reason="the release warns when it is imported")
def test_imports_say_nothing():
    """Before the plugin is there: what the rebuilt fairseq leaves out (scripts/build_fairseq.py)."""
    commands = ", ".join(f"fairseq_cli.{command}" for command in ("train", "hydra_train", "preprocess", "eval_lm"))
    program = f"import logging; logging.basicConfig(level=logging.INFO); import {commands}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
