"""Whole models whose experts stay in the checkpoint's files: read ahead or not, in one shard or several, and cut."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import recorded
import torch
from plugin import USER_DIR

from fairseq_hash.checkpoint.convert import merge, split
from fairseq_hash.lm import decoder

LAYERS = 6
WORDS = ("--num-experts", "4", "--decoder-layers", str(LAYERS), "--sparse-layers", "0,1,2,3,4,5")
CASES = {
    "tables": ("--router", "hash", "--hash-per-layer", "--hash-table", "random"),
    "segments": ("--router", "hash", "--multi-hash", "2"),
    "learned": ("--router", "switch"),
    "both": ("--router", "hash,switch,hash,topk,hash,base", "--hash-table", "random"),
}


def save(data, folder, *words):
    """Train for one update; return the checkpoint's path."""
    trainer, epoch_itr = recorded.make_trainer(data, (*WORDS, *words, "--max-tokens", "48", "--save-dir", str(folder)))
    recorded.run(trainer, epoch_itr, 1)
    recorded.checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, 1.0)
    return folder / "checkpoint_last.pt"


def outputs(path, batches, **overrides):
    """Return the logits of some batches."""
    [model], _, _ = recorded.checkpoint_utils.load_model_ensemble_and_task([str(path)], overrides)
    with torch.no_grad():
        return [model.eval()(token_BL)[0] for token_BL in batches]


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_in_memory_to_the_bit(data, tmp_path, monkeypatch, case):
    """Also of a single token, for which few experts serve, and with padding."""
    one = save(data, tmp_path / "one", *CASES[case])
    three, plain = tmp_path / "three" / "cut.pt", tmp_path / "plain.pt"
    three.parent.mkdir()
    split(one, three, 3)
    merge(one, plain, with_optimizer=False)
    draw = torch.Generator().manual_seed(len(case))
    batches = [torch.randint(4, 60, shape, generator=draw) for shape in ((1, 1), (3, 8), (2, 3))]
    batches[2][1, :2] = 1  # padding
    expected = outputs(one, batches)
    begun = []
    original = decoder.ReadAhead
    monkeypatch.setattr(decoder, "ReadAhead", lambda layers: begun.append(layers) or original(layers))
    for path in (one, three, plain):
        assert all(map(torch.equal, outputs(path, batches, map_experts=True), expected)), path
    assert len(begun) == 9 and all(len(layers) == LAYERS for layers in begun)
    monkeypatch.setattr(decoder, "ReadAhead", lambda layers: None)
    for path in (one, three):
        assert all(map(torch.equal, outputs(path, batches, map_experts=True), expected)), path


CUT_AND_EVALUATE = """
import os, sys
file, length, *sys.argv[1:] = sys.argv[1:]
import fairseq_hash
fairseq_hash.register()
from fairseq_hash.moe import read_ahead
original = read_ahead.read
def cut_and_read(rows):
    os.truncate(file, int(length))
    original(rows)
read_ahead.read = cut_and_read
from fairseq_cli.eval_lm import cli_main
cli_main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems are not asked to read ahead")
def test_a_file_that_is_cut_during_an_evaluation_is_one_line(data, tmp_path):
    """Cut before layer 4's experts, when the first layer is read."""
    path = save(data, tmp_path, "--router", "hash", "--no-save-optimizer-state")
    [shard] = tmp_path.glob("experts/*")
    content = shard.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    starts = [about["data_offsets"][0] for name, about in header.items() if "layers.4." in name]
    given = [shard, 8 + size + min(starts), data, "--user-dir", USER_DIR, "--cpu", "--path", path, "--gen-subset"]
    given += ["test", "--tokens-per-sample", "16", "--model-overrides", "{'map_experts': True}"]
    command = [sys.executable, "-c", CUT_AND_EVALUATE, *map(str, given)]
    paths = os.pathsep.join([str(Path(USER_DIR).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("fairseq_hash: experts cannot be read from the checkpoint's files any more (")
