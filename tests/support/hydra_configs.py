"""A small experiment beside the project's own, for commands that take --config-dir."""

import json
import re
import shutil
from pathlib import Path

import hydra
import pytest

IS_CURRENT = tuple(map(int, hydra.__version__.split(".")[:2])) >= (1, 3)
needs_current_hydra = pytest.mark.skipif(not IS_CURRENT, reason="Hydra 1.0, of the fairseq release")
ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
NAME = "tiny/hash"
EXPERIMENT = """
# @package _global_
defaults:
  - /laptop/_shared
  - override /router: hash
  - _self_
task: {{data: "{data}", tokens_per_sample: 16}}
experiment: {{vocabulary: 60}}
model:
  {{decoder_layers: 2, decoder_embed_dim: 32, decoder_ffn_embed_dim: 64, decoder_attention_heads: 2,
   num_experts: 4, sparse_layers: "0,1"}}
dataset: {{max_tokens: 256, validate_interval_updates: 0, disable_validation: true}}
optimization: {{max_update: {updates}}}
criterion: {{update_freq_ranks: 2}}
checkpoint: {{save_interval_updates: 0}}
common: {{log_interval: 1, tensorboard_logdir: "${{hydra:runtime.output_dir}}/board"}}
hydra:
  run: {{dir: "{runs}/${{hydra:job.override_dirname}}/seed${{common.seed}}"}}
  sweep: {{dir: "{runs}"}}
"""


def write_configs(folder, data, updates):
    """Write a folder of configurations with the experiment NAME; return the arguments that choose it.

    Its runs lie in `folder / "runs"`; an update is of two batches on any number of ranks.
    """
    configs = shutil.copytree(ROOT / "configs", folder / "my configs")
    path = configs / f"{NAME}.yaml"
    path.parent.mkdir()
    path.write_text(EXPERIMENT.format(data=data, updates=updates, runs=folder / "runs").lstrip())
    return ("--config-dir", str(configs), "--config-name", NAME)


def logged(log):
    """Return {update: loss} of a run's log; an update that is logged twice is an error."""
    lines = re.findall(r"\[train_inner\]\[INFO\] - (\{.*\})", log.read_text())
    found = {}
    for line in map(json.loads, lines):
        update = int(line["num_updates"])
        assert update not in found, f"update {update} twice in {log}"
        found[update] = float(line["loss"])
    return found
